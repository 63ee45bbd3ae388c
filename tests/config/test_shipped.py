"""What is shipped beside the code says what the model says: example, schema, reference."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dicomproxy.cli import check
from dicomproxy.config import json_schema, load, loads
from dicomproxy.config.keys import walk
from dicomproxy.config.loader import json_schema_text
from dicomproxy.config.reference import with_tables

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "config" / "dicomproxy.example.yaml"
SCHEMA = ROOT / "config" / "dicomproxy.schema.json"
REFERENCE = ROOT / "docs" / "configuration.md"

REST = (
    "proxy: {ae_title: DICOMPROXY}",
    "local: {ae_title: LOCALPACS, host: 10.0.0.5, port: 104}",
    "cache: {directory: /var/cache/dicomproxy, max_size: 200GB}",
)
COMMENTED_KEY = re.compile(r"^( *)# ( *(?:- )?[a-z0-9_]+:.*)$", re.MULTILINE)


def uncommented(text: str) -> str:
    """Return *text* with every commented-out key in force."""
    return COMMENTED_KEY.sub(r"\1\2", text)


def member_with(tree: Any, step: str) -> Any:
    """Return what is under a key; of a list's members the first, if all have their own keys."""
    if isinstance(tree, list):
        tree = next(member for member in tree if step.removesuffix("[]") in member)
    return tree[step.removesuffix("[]")]


def yaml_blocks() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return [
        (f"{page.name}-{number}", block)
        for page in pages
        if page.exists()
        for number, block in enumerate(
            re.findall(r"^```ya?ml\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        )
        if re.search(r"^(proxy|local|cache|sources|workstations):", block, re.MULTILINE)
    ]


def test_example_loads() -> None:
    """The example is a valid configuration as it stands."""
    assert load(EXAMPLE).proxy.ae_title == "DICOMPROXY"


def test_example_loads_with_every_key_in_force() -> None:
    """Each commented-out key of the example is valid where it stands."""
    settings = loads(uncommented(EXAMPLE.read_text("utf-8")))

    assert settings.sources[0].test_study == "1.2.840.99999.2"


def test_example_shows_every_key_with_its_default() -> None:
    """No key is missing from the example, and one with a default stands there with it."""
    tree = yaml.load(uncommented(EXAMPLE.read_text("utf-8")), yaml.BaseLoader)

    for key in walk():
        shown = tree
        for step in re.findall(r"\w+(?:\[\])?", key.path):
            shown = member_with(shown, step)
        if key.default not in (None, "[]"):
            assert (key.path, shown) == (key.path, key.default)


def test_every_key_is_explained() -> None:
    """The reference has words for every key."""
    for key in walk():
        assert key.description, key.path


@pytest.mark.parametrize(("name", "block"), yaml_blocks())
def test_configurations_in_the_docs_load(name: str, block: str) -> None:
    """A reader may copy any configuration that the docs show, an excerpt into a whole one."""
    absent = [
        line for line in REST if not re.search(f"^{line.split(':')[0]}:", block, re.MULTILINE)
    ]
    loads("\n".join([block, *absent]), name)


def test_schema_is_in_step_with_the_model() -> None:
    """The schema is what python -m dicomproxy.config.reference writes."""
    assert SCHEMA.read_text("utf-8") == json_schema_text()


def test_reference_is_in_step_with_the_model() -> None:
    """The tables are what python -m dicomproxy.config.reference writes."""
    page = REFERENCE.read_text("utf-8")

    assert with_tables(page) == page


def test_schema_takes_what_the_loader_takes() -> None:
    """An editor finds no fault in the example, commented out or in force."""
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    text = EXAMPLE.read_text("utf-8")

    for version in (text, uncommented(text)):
        assert [error.message for error in validator.iter_errors(yaml.safe_load(version))] == []


@pytest.mark.parametrize(
    "wrong",
    [
        "proxy: {ae_title: A, prot: 1}",
        "proxy: {ae_title: ABCDEFGHIJKLMNOPQ}",
        "proxy: {}",
        "log: {level: loud}",
        "web: {port: 70000}",
        "retrieve: {retry_pause: 5 seconds}",
        "sources: [{name: local, ae_title: A, host: h, port: 1}]",
        "sources: [{name: s, type: dicomweb}]",
    ],
)
def test_schema_refuses_what_the_loader_refuses(wrong: str) -> None:
    """An editor marks what check would."""
    good = yaml.safe_load(EXAMPLE.read_text("utf-8"))
    validator = jsonschema.Draft202012Validator(json_schema())

    assert list(validator.iter_errors({**good, **yaml.safe_load(wrong)})) != []


def test_schema_names_its_dialect() -> None:
    """Editors know by which rules to read the schema."""
    assert json.loads(SCHEMA.read_text("utf-8"))["$schema"].endswith("2020-12/schema")


def test_check_prints_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    """A good file is summed up on stdout, with exit status 0."""
    assert check.run(EXAMPLE) == 0

    out, err = capsys.readouterr()
    assert err == ""
    assert "north (NORTHPACS at 10.9.0.4:104, c-move)" in out
    assert "200 GB in /var/cache/dicomproxy" in out


def test_check_prints_every_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad file is one line a fault on stderr, with exit status 2."""
    file = tmp_path / "site.yaml"
    file.write_text("proxy: {ae_title: A, port: x}\nlocal: {}\nlog: {level: loud}\n")

    assert check.run(file) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": found")[0] for line in err.splitlines()] == [
        f"{file}:1:1: cache",
        f"{file}:1:28: proxy.port",
        f"{file}:2:8: local.ae_title",
        f"{file}:2:8: local.host",
        f"{file}:2:8: local.port",
        f"{file}:3:14: log.level",
    ]


def test_check_of_a_missing_file_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is not there is a fault like any other."""
    assert check.run(tmp_path / "nowhere.yaml") == 2
    assert capsys.readouterr().err == (
        f"{tmp_path / 'nowhere.yaml'}: found no such file, expected a YAML file\n"
    )
