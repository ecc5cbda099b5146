"""What the site needs beyond plain pages: formulas, links to the reference, and the notebook.

Formulas are drawn while the site is built: its pages need no script and nothing from elsewhere,
and read the same offline. Names of mmvq in code style become links, so that the pages in docs/
stay plain where they are read as files. The notebook shows what its file holds of its last run.
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

# of the pages that name functions without their module
MODULES = {"equations.md": "mmvq.functional", "kernels.md": "mmvq_kernels"}
STORY = Path(__file__).parents[1] / "examples" / "story.ipynb"
FORMULA = re.compile(r'(?s)<(span|div) class="arithmatex">(.*?)</\1>')
SIZE = 17  # of a formula's letters where those around it measure 16
# a name alone or with arguments; what stands in a block, a link or a title is left as it is
NAME = re.compile(
    r"(?s)<pre.*?</pre>|<a\b.*?</a>|<h\d.*?</h\d>|<code>([A-Za-z_][\w.]*)(\(.*?\))?</code>"
)

ziamath.config.svg2 = False  # else the formulas of a page share ids
operators["‖", "infix"]["stretchy"] = "false"  # else a norm is as tall as its line


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of the notebook."""
    for name, picture in story(json.loads(STORY.read_text()))[1].items():
        files.append(File.generated(config, name, content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Put the notebook's text where its page is."""
    ours = page.file.src_uri == "story.md"
    return story(json.loads(STORY.read_text()))[0] if ours else markdown


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Draw the formulas of a page, and link the names."""
    content = FORMULA.sub(lambda found: formula(html.unescape(found[2]).strip()), content)
    module = MODULES.get(page.file.src_uri)
    return NAME.sub(lambda found: _link(found, module), content)


def formula(delimited: str) -> str:
    r"""SVG of `\(inline\)` or `\[display\]` TeX, in the colour and size of the text."""
    tex, inline = delimited[2:-2].strip(), delimited.startswith(r"\(")
    if "\\" in tex2mml(tex):  # what the renderer does not know, it would print
        raise PluginError(f"the site cannot draw {tex}")
    signed = re.sub(r"(^|[=(\[]\s*)-", r"\1{-}", tex)  # a sign, which has no space after it
    svg = ziamath.Latex(signed, size=SIZE, inline=inline, color="currentColor").svgxml()
    _, top, width, height = map(float, svg.attrib["viewBox"].split())
    em = {"width": width, "height": height, "vertical-align": -(top + height)}
    style = ";".join(f"{name}:{x / 16:.3f}em" for name, x in em.items())
    svg.attrib |= {"class": "formula", "role": "img", "aria-label": tex, "style": style}
    del svg.attrib["width"], svg.attrib["height"]
    tag = "span" if inline else "div"
    return f'<{tag} class="arithmatex">{ElementTree.tostring(svg, encoding="unicode")}</{tag}>'


def _link(found: re.Match[str], module: str | None) -> str:
    """`<code>` as a link to the name in it; without one where the reference has no such name."""
    name = found[1]
    if name and module and re.fullmatch(r"[a-z_]+", name) and name not in ("mmvq", "mmvq_kernels"):
        name = f"{module}.{name}"
    if name and re.match(r"[A-Z][a-z]*[A-Z]", name) and "." not in name:  # of a class
        name = f"mmvq.compat.cmg.{name}" if name.startswith("CMG") else f"mmvq.{name}"
    if not name or not re.match(r"mmvq(_kernels)?\.", name):
        return found[0]
    return f'<autoref identifier="{name}" optional>{found[0]}</autoref>'


def story(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A notebook as markdown, and the pictures that its cells left.

    A cell tagged `hide-input` is folded; `alt` in its metadata says what its picture shows.
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
