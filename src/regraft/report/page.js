(function () {
  "use strict";
  var root = document.documentElement, key = "regraft-theme";
  function savedTheme() { try { return localStorage.getItem(key); } catch (error) { return null; } }
  function saveTheme(theme) { try { localStorage.setItem(key, theme); } catch (error) { /* a local file may have no storage */ } }
  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
  var saved = savedTheme();
  if (saved === "light" || saved === "dark") { root.dataset.theme = saved; }

  document.addEventListener("DOMContentLoaded", function () {
    var button = document.querySelector("[data-theme-button]");
    function updateLabel() { button.textContent = isDark() ? "Light theme" : "Dark theme"; }
    button.hidden = false;
    button.addEventListener("click", function () {
      root.dataset.theme = isDark() ? "light" : "dark";
      saveTheme(root.dataset.theme);
      updateLabel();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", updateLabel);
    updateLabel();
    document.querySelectorAll("[data-browser]").forEach(enableFilter);
    highlightCurrentSection();
  });

  function enableFilter(browser) {
    var form = browser.querySelector("[data-controls]"), search = form.querySelector("[data-search]");
    var kind = form.querySelector("[data-kind]"), label = form.querySelector("[data-label]");
    var count = browser.querySelector("[data-count]"), noMatch = browser.querySelector("[data-no-match]");
    var entries = Array.from(browser.querySelectorAll("tbody tr, [data-entry]"), function (row) {
      return { row: row, text: row.textContent.toLowerCase() };
    });
    function filter() {
      var words = search.value.toLowerCase().split(/\s+/).filter(Boolean), shown = 0;
      entries.forEach(function (entry) {
        var matches = (!kind.value || entry.row.dataset.kind === kind.value) &&
          (!label || !label.value || entry.row.dataset.label === label.value) &&
          words.every(function (word) { return entry.text.includes(word); });
        entry.row.hidden = !matches;
        shown += matches;
      });
      count.textContent = shown;
      noMatch.hidden = shown > 0;
    }
    form.hidden = false;
    form.addEventListener("input", filter);
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    filter();
  }

  function highlightCurrentSection() {
    var links = new Map();
    document.querySelectorAll("nav a").forEach(function (link) { links.set(link.hash.slice(1), link); });
    if (!("IntersectionObserver" in window)) { return; }
    var watcher = new IntersectionObserver(function (entries) {
      entries.forEach(function (entry) {
        if (!entry.isIntersecting) { return; }
        links.forEach(function (link) { link.removeAttribute("aria-current"); });
        links.get(entry.target.id).setAttribute("aria-current", "true");
      });
    }, { rootMargin: "-10% 0px -80% 0px" });
    document.querySelectorAll(".section, .card").forEach(function (section) {
      if (links.has(section.id)) { watcher.observe(section); }
    });
  }
})();
