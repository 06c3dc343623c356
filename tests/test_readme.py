"""What the README shows, runs."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_example_of_another_network_runs(capsys):
  code = re.search(r"<!-- test: runs -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
  assert len(code.splitlines()) <= 18
  exec(compile(code, "README.md", "exec"), {})
  assert "entries of second are negative" in capsys.readouterr().out
