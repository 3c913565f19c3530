(function () {
  "use strict";
  var root = document.documentElement, key = "regraft-theme";
  function remembered() { try { return localStorage.getItem(key); } catch (error) { return null; } }
  function remember(theme) { try { localStorage.setItem(key, theme); } catch (error) { /* a page from a file may not */ } }
  function dark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
  var before = remembered();
  if (before === "light" || before === "dark") { root.dataset.theme = before; }

  document.addEventListener("DOMContentLoaded", function () {
    var button = document.querySelector("[data-theme-button]");
    function name() { button.textContent = dark() ? "Light theme" : "Dark theme"; }
    button.hidden = false;
    button.addEventListener("click", function () {
      root.dataset.theme = dark() ? "light" : "dark";
      remember(root.dataset.theme);
      name();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
    name();
    document.querySelectorAll("[data-browser]").forEach(browse);
    follow();
  });

  function browse(box) {
    var form = box.querySelector("[data-controls]"), search = form.querySelector("[data-search]");
    var kind = form.querySelector("[data-kind]"), label = form.querySelector("[data-label]");
    var count = box.querySelector("[data-count]"), nothing = box.querySelector("[data-nothing]");
    var rows = Array.from(box.querySelectorAll("tbody tr"), function (row) {
      return { row: row, text: row.textContent.toLowerCase() };
    });
    function filter() {
      var words = search.value.toLowerCase().split(/\s+/).filter(Boolean), shown = 0;
      rows.forEach(function (one) {
        var fits = (!kind.value || one.row.dataset.kind === kind.value) &&
          (!label.value || one.row.dataset.label === label.value) &&
          words.every(function (word) { return one.text.includes(word); });
        one.row.hidden = !fits;
        shown += fits;
      });
      count.textContent = shown;
      nothing.hidden = shown > 0;
    }
    form.hidden = false;
    form.addEventListener("input", filter);
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    filter();
  }

  function follow() {
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
