"""Docstrings as they are written here, Markdown at heart, into what Sphinx reads.

Backticks are code; an indented block after a blank line is a formula or a program; a table's
rows begin with a pipe. Google's sections (`Args:` and so on) are left to napoleon.
"""

import re

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Examples?|Notes?):\s*$")
ITEM = re.compile(r"\s*([-*]|\d+\.) ")
CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
MARKUP = re.compile(r"[*|\\`]|(?<=\w)_(?=\W|$)")


def to_rst(lines: list[str]) -> list[str]:
  """The lines of a docstring as reStructuredText."""
  out: list[str] = []
  first = ""  # The last line without indentation: what indented ones belong to.
  for paragraph in _paragraphs(lines):
    indented = paragraph[0].startswith(" ")
    belongs = SECTION.match(first) or ITEM.match(first)
    if all(line.startswith("|") and line.endswith("|") for line in paragraph):
      out += ["::", "", *(f"  {line}" for line in paragraph)]
    elif indented and not belongs:
      out += ["::", "", *paragraph]
    else:
      out += _prose("\n".join(paragraph)).split("\n")
    out.append("")
    first = next((line for line in reversed(paragraph) if not line.startswith(" ")), first)
  return out


def _paragraphs(lines: list[str]) -> list[list[str]]:
  found: list[list[str]] = [[]]
  for line in lines:
    if line.strip():
      found[-1].append(line)
    elif found[-1]:
      found.append([])
  return [paragraph for paragraph in found if paragraph]


def _prose(text: str) -> str:
  """Code in double backticks, and nothing else that is markup but the marks of lists."""
  spans: list[str] = []

  def keep(match: re.Match) -> str:
    glued = re.match(r"\w", text[match.end() :])
    spans.append(f"``{match[2].strip()}``" + ("\\ " if glued else ""))
    return f"\0{len(spans) - 1}\0"

  kept = CODE.sub(keep, text)
  lines = []
  for line in kept.split("\n"):
    mark = ITEM.match(line)
    head = mark[0] if mark else ""
    lines.append(head + MARKUP.sub(r"\\\g<0>", line[len(head) :]))
  text = "\n".join(lines)
  text = re.sub(r"(?m)^(\s+)\\\*(\\\*)?(\w+):", r"\1*\2\3:", text).replace("*\\*", "**")
  return re.sub(r"\0(\d+)\0", lambda match: spans[int(match[1])], text)
