"""The documentation: commands, files, keys and names in it exist; what can run here, runs."""

import configparser
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest
import yaml

import convex_jax
from convex_jax import main
from convex_jax.__main__ import COMMANDS
from convex_jax.models import catalog
from convex_jax.training import schema
from tests.support import ROOT
from tests.support.injections import free_port

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FEW = ["--config.steps=4", "--config.batch_size=16", "--config.model.size=tiny"]
FEW += ["--config.model.patch=4", "--config.model.depth=1", "--config.data.train_fraction=0.1"]
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)

sys.path.append(str(DOCS))
import generate  # noqa: E402


def commands_in(text: str) -> list[str]:
  """The shell commands of a page: lines of `sh` blocks, and inline code."""
  blocks = re.findall(r"^```(\S*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
  lines = "".join(body for kind, body in blocks if kind == "sh").replace("\\\n", " ").split("\n")
  return lines + re.findall(r"`(python -m [^`\n]+)`", text)


def help_of(words: list[str], capsys) -> str:
  """What `python -m convex_jax WORDS --help` prints."""
  module = importlib.import_module(COMMANDS[words[0]][0])
  with pytest.raises(SystemExit, match="0"):
    module.main([*words[1:], "--help"])
  return capsys.readouterr().out


# What the pages name exists.


@each_page
def test_commands_and_their_flags_exist(path, capsys):
  for line in commands_in(path.read_text()):
    _, found, after = line.partition("python -m ")
    if not found:
      continue
    module, *words = shlex.split(re.split(r"\s#|&&|\"$", after)[0])
    if module == "convex_jax.main":
      words = ["train", *words]
    else:
      assert module == "convex_jax", f"{line}: python -m convex_jax COMMAND, or convex_jax.main"
    if words[0] == "COMMAND":
      continue
    assert words[0] in COMMANDS, line
    known = help_of(words[: 2 if words[0] == "data" else 1], capsys)
    for word in words:
      if word.startswith("--") and not word.startswith("--config."):
        assert f"{word.partition('=')[0]} " in re.sub(r"[=\],]", " ", known) + " ", line


def test_a_flag_that_does_not_exist_is_found(tmp_path, capsys):
  page = tmp_path / "page.md"
  page.write_text("```sh\npython -m convex_jax.main --config=configs/mlp.py --wrokdir=x\n```")
  with pytest.raises(AssertionError, match="wrokdir"):
    test_commands_and_their_flags_exist(page, capsys)


@each_page
def test_files_extras_and_targets_exist(path):
  text = path.read_text()
  folders = [name for name in ("configs", "docs", "experiments") if (ROOT / name).exists()]
  for name in re.findall(rf"\b((?:{'|'.join(folders)})/[\w./]*\w)", text):
    assert (ROOT / name).exists(), name
  extras = configparser.ConfigParser()
  extras.read(ROOT / "setup.cfg")
  for extra in re.findall(r"'\.\[(\w+)\]'", text):
    assert extra in extras["options.extras_require"], extra
  targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
  for target in re.findall(r"`make (\w+)`", text):
    assert target in targets, target


@each_page
def test_config_keys_exist(path):
  text = path.read_text()
  keys = {*schema.RULES}
  keys |= {f"model.{field}" for name in catalog.names() for field in catalog.fields(name)}
  sections = {key.partition(".")[0] for key in schema.RULES if "." in key}
  named = re.findall(r"--config\.([\w.]*\w)=", text)
  named += re.findall(rf"`((?:{'|'.join(sections)})\.\w+)(?:=[^`]*)?`", text)
  assert not {*named} - keys - {"KEY", "log.txt"}


def exists(name: str) -> bool:
  """Whether `convex_jax.a.b.C` is a module, or something in one."""
  module, *rest = name.split(".")
  thing = importlib.import_module(module)
  for part in rest:
    inner = f"{getattr(thing, '__name__', '')}.{part}"
    if not hasattr(thing, part) and importlib.util.find_spec(inner):
      importlib.import_module(inner)
    if not hasattr(thing, part):
      return False
    thing = getattr(thing, part)
  return True


def test_python_names_exist():
  text = "\n".join(page.read_text() for page in PAGES)
  names = {*re.findall(r"\bconvex_jax(?:\.[a-z_]\w*)+(?:\.[A-Z]\w*)?", text)}
  assert len(names) >= 5 and not [name for name in names if not exists(name)]
  assert not exists("convex_jax.proof.certifi")  # The control.


def test_python_examples_run(capsys):
  """Those marked so: each prints a verdict that its page shows, or asserts what it claims."""
  marked = r"<!-- test: runs -->\n```python\n(.*?)```"
  blocks = [block for page in PAGES for block in re.findall(marked, page.read_text(), re.DOTALL)]
  assert len(blocks) >= 2
  for block in blocks:
    exec(compile(block, "example.py", "exec"), {})
    printed = capsys.readouterr().out
    assert "assert " in block or "PROVED" in printed or "REFUTED" in printed, block
    said = re.findall(r"^print\(.*\)  # ([A-Z]{5,})", block, re.MULTILINE)
    assert said == re.findall(r"^([A-Z]{5,})", printed, re.MULTILINE)[: len(said)], block


def test_the_options_for_several_processes_are_described():
  text, known = (DOCS / "pods.md").read_text(), main._parser().format_help()
  for flag in ("distributed", "coordinator", "num_processes", "process_id", "join_timeout"):
    assert f"--{flag}" in known and f"--{flag}" in text


def test_each_command_for_pods_is_said_to_be_tested_or_only_read():
  """And those that a test takes from the page are said to be tested."""
  blocks = re.split(r"^```sh$", (DOCS / "pods.md").read_text(), flags=re.MULTILINE)[:-1]
  before = [block.rpartition("```\n")[2].strip().splitlines() for block in blocks]
  said = [re.findall(r"\*(Tested|Read)\*", "\n".join(lines)) for lines in before]
  assert len(said) > 10
  for lines, words in zip(before, said, strict=True):
    assert words, lines
    assert not lines[-1].startswith("<!-- test: runs") or words[-1] == "Tested", lines


# The generated parts.


def test_the_generated_tables_are_complete():
  from convex_jax import errors
  from convex_jax.proof.rules import RULES

  keys = generate.config_keys()
  assert keys.keys() == schema.RULES.keys()
  assert not [key for key, (_, expected, _) in keys.items() if not expected]
  assert keys["batch_size"][2] and keys["data.loader"][2] and keys["steps_per_call"][2]
  assert not re.search(r"\|\s*\|$", generate.architecture_keys(), re.MULTILINE)  # An empty cell.
  text = generate.config_tables()
  assert all(f"`{key}`" in text for key in schema.RULES)
  assert all(f"`{name}`" in generate.primitives() for name in RULES)
  assert all(f"convex_jax {name}" in generate.commands() for name in COMMANDS)
  assert f"| {errors.NOT_PROVED} |" in generate.exit_codes()
  assert all(f"| {end.code} |" in generate.exit_codes() for end in errors.Ended.__subclasses__())
  assert all(f"`{name}`" in generate.sizes() for name in catalog.names())


def test_every_module_has_a_page():
  pages = generate.api_pages()
  package = pathlib.Path(convex_jax.__file__).parent
  for file in package.rglob("*.py"):
    parts = file.relative_to(package.parent).with_suffix("").parts
    name = ".".join(parts).removesuffix(".__init__")
    if "." in name and "._" not in name:
      assert f"{name}.md" in pages


def test_every_page_is_in_the_table_of_contents():
  listed = re.findall(r"^[a-z_]+$", (DOCS / "index.md").read_text(), re.MULTILINE)
  assert {path.stem for path in PAGES} == {*listed, "index"}


@pytest.mark.parametrize(
  "written, read",
  [
    ("A `name` of x_BxD, *both*.", "A ``name`` of x_BxD, \\*both\\*."),
    ("|y - x| is `a\nb`s.", "\\|y - x\\| is ``a\nb``\\ s."),
    ("One:\n\n    y = x_ + `1`\n\nTwo.", "One:\n\n::\n\n    y = x_ + `1`\n\nTwo."),
    ("| a | b |\n|---|---|", "::\n\n  | a | b |\n  |---|---|"),
    ("Args:\n  *args: its `x`.", "Args:\n  *args: its ``x``."),
  ],
)
def test_docstrings_become_restructured_text(written, read):
  from docstrings import to_rst

  text = "\n".join(to_rst(written.split("\n"))).strip()
  assert text == read


# Commands that can run here, on one process, on two, on one of two.


def command_of(marker: str, workdir, data_dir, **names) -> list[str]:
  """The marked command line, its capital names replaced, with a smaller job."""
  page = (DOCS / "pods.md").read_text()
  text = re.search(rf"<!-- test: {marker} -->\n```sh\n(.*?)```", page, re.DOTALL)[1]
  for name, value in names.items():
    text = re.sub(rf"\b{name}\b", str(value), text)
  words = shlex.split(text.replace("\\\n", " "))
  assert words[0] == "python" and not re.search(r"[=:][A-Z]+\b", text), text
  words = [word for word in words[1:] if not word.startswith("--workdir")]
  return [sys.executable, *words, *FEW, f"--workdir={workdir}", f"--config.data.dir={data_dir}"]


def start(args):
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
  pipe = subprocess.PIPE
  return subprocess.Popen(args, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=env)


def test_the_command_for_one_machine_runs_on_all_its_devices(tmp_path, data_dir):
  process = start(command_of("runs", tmp_path / "run", data_dir))
  _, errors = process.communicate(timeout=240)
  assert process.returncode == 0, errors
  assert convex_jax.load(str(tmp_path / "run")).step == 4


@pytest.mark.slow
def test_the_commands_by_hand_run_on_two_processes(tmp_path, data_dir):
  port = free_port()
  both = [
    start(command_of("runs on two processes", tmp_path / "run", data_dir, PORT=port, I=i))
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=240) for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  assert convex_jax.load(str(tmp_path / "run")).step == 4


@pytest.mark.slow
def test_the_skypilot_script_runs(tmp_path, data_dir):
  """The script of the file, on one node whose address SkyPilot would give."""
  task = yaml.safe_load((DOCS / "skypilot.yaml").read_text())
  script = task["run"].replace(".venv/bin/python", sys.executable).replace("8476", str(free_port()))
  args = [*FEW, f"--workdir={tmp_path / 'run'}", f"--config.data.dir={data_dir}"]
  env = {"CONFIG": task["envs"]["CONFIG"] + ":digits", "ARGS": " ".join(args)}
  env |= {"SKYPILOT_NODE_IPS": "127.0.0.1\n", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
  done = subprocess.run(
    ["bash", "-euc", script], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert convex_jax.load(str(tmp_path / "run")).step == 4


def test_a_process_whose_others_do_not_join_says_so(tmp_path, data_dir):
  args = command_of("runs on two processes", tmp_path / "run", data_dir, PORT=free_port(), I=0)
  began = time.monotonic()
  process = start([*args, "--join_timeout=3"])
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 2 and time.monotonic() - began < 60
  assert "Not all of 2 processes joined within --join_timeout=3 s." in errors
  assert "Check failure" not in errors and not (tmp_path / "run").exists()
