"""MkDocs hooks: draw formulas, link names to the reference, and insert the notebook.

Formulas are drawn as SVG while the site is built, so pages need no script and no network.
Names of mmvq in code style become links, so the pages in docs/ stay plain Markdown. The notebook
page shows the outputs that are stored in its file.
"""

from __future__ import annotations

import base64
import html
import json
import re
import textwrap
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ziamath
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from ziamath.operators import operators
from ziamath.tex import tex2mml

# page -> module of the functions that it names without a module
MODULES = {"equations.md": "mmvq.functional", "kernels.md": "mmvq_kernels"}
STORY = Path(__file__).parents[1] / "examples" / "story.ipynb"
FORMULA = re.compile(r'(?s)<(span|div) class="arithmatex">(.*?)</\1>')
SIZE = 17  # font size of formulas, where the text has 16
# a name, with or without arguments; code blocks, links and headings are skipped
NAME = re.compile(
    r"(?s)<pre.*?</pre>|<a\b.*?</a>|<h\d.*?</h\d>|<code>([A-Za-z_][\w.]*)(\(.*?\))?</code>"
)

ziamath.config.svg2 = False  # otherwise the formulas of a page share ids
operators["‖", "infix"]["stretchy"] = "false"  # otherwise a norm is as tall as its line


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the images of the notebook."""
    for name, picture in story(json.loads(STORY.read_text()))[1].items():
        files.append(File.generated(config, name, content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Replace the content of story.md by the notebook."""
    ours = page.file.src_uri == "story.md"
    return story(json.loads(STORY.read_text()))[0] if ours else markdown


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Draw the formulas of a page and link its names."""
    content = FORMULA.sub(lambda found: formula(html.unescape(found[2]).strip()), content)
    module = MODULES.get(page.file.src_uri)
    return NAME.sub(lambda found: _link(found, module), content)


def formula(delimited: str) -> str:
    r"""SVG of `\(inline\)` or `\[display\]` TeX, in the colour and size of the text."""
    tex, inline = delimited[2:-2].strip(), delimited.startswith(r"\(")
    if "\\" in tex2mml(tex):  # commands that ziamath does not know are printed as text
        raise PluginError(f"the site cannot draw {tex}")
    signed = re.sub(r"(^|[=(\[]\s*)-", r"\1{-}", tex)  # a minus sign has no space after it
    svg = ziamath.Latex(signed, size=SIZE, inline=inline, color="currentColor").svgxml()
    _, top, width, height = map(float, svg.attrib["viewBox"].split())
    em = {"width": width, "height": height, "vertical-align": -(top + height)}
    style = ";".join(f"{name}:{x / 16:.3f}em" for name, x in em.items())
    svg.attrib |= {"class": "formula", "role": "img", "aria-label": tex, "style": style}
    del svg.attrib["width"], svg.attrib["height"]
    tag = "span" if inline else "div"
    return f'<{tag} class="arithmatex">{ElementTree.tostring(svg, encoding="unicode")}</{tag}>'


def _link(found: re.Match[str], module: str | None) -> str:
    """Link `<code>` to the name in it. The link is optional: unknown names stay as they are."""
    name = found[1]
    if name and module and re.fullmatch(r"[a-z_]+", name) and name not in ("mmvq", "mmvq_kernels"):
        name = f"{module}.{name}"
    if name and re.match(r"[A-Z][a-z]*[A-Z]", name) and "." not in name:  # a class
        name = f"mmvq.compat.cmg.{name}" if name.startswith("CMG") else f"mmvq.{name}"
    if not name or not re.match(r"mmvq(_kernels)?\.", name):
        return found[0]
    return f'<autoref identifier="{name}" optional>{found[0]}</autoref>'


def story(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Convert a notebook to Markdown and its images {name: PNG}.

    Cells tagged `hide-input` are folded. The metadata `alt` is the alternative text of the image.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source, metadata = "".join(cell["source"]), cell["metadata"]
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        code = f"``` {{ .python }}\n{source}\n```"
        folded = "hide-input" in metadata.get("tags", ())
        parts.append('??? note "Code"\n' + textwrap.indent(code, "    ") if folded else code)
        for output in cell["outputs"]:
            if picture := output.get("data", {}).get("image/png"):
                name = f"images/story-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(picture)
                parts.append(f"![{metadata['alt']}]({name})")
            elif "text" in output:
                parts.append(f"``` {{ .text }}\n{''.join(output['text'])}```")
    return "\n\n".join(parts), pictures
