"""Whatever a PIXm manager answers: IDs, none, or one exception, and "none" only in its words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.identity.pixm import read_answer
from dicomproxy.ports import CrossReferenceError

TARGET = "urn:oid:1.2.2"
STATUSES = st.sampled_from([200, 201, 204, 301, 400, 403, 404, 500, 503])
NAMES = [
    "resourceType",
    "parameter",
    "issue",
    "name",
    "valueIdentifier",
    "system",
    "value",
    "code",
    "details",
    "text",
    "diagnostics",
]
WORDS = [
    "Parameters",
    "OperationOutcome",
    "targetIdentifier",
    "targetId",
    TARGET,
    "not-found",
    "code-invalid",
    "sourceIdentifier Patient Identifier not found",
    "sourceIdentifier Assigning Authority not found",
    "N-1",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(WORDS),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=20,
)
IDENTIFIER = st.fixed_dictionaries(
    {"name": st.just("targetIdentifier")},
    optional={
        "valueIdentifier": st.one_of(
            ANYTHING,
            st.fixed_dictionaries(
                {},
                optional={
                    "system": st.one_of(ANYTHING, st.just(TARGET)),
                    "value": st.one_of(ANYTHING, st.text(max_size=4)),
                },
            ),
        )
    },
)
RESOURCE = st.one_of(
    ANYTHING,
    st.fixed_dictionaries(
        {
            "resourceType": st.just("Parameters"),
            "parameter": st.lists(st.one_of(IDENTIFIER, ANYTHING), max_size=3),
        }
    ),
    st.fixed_dictionaries(
        {"resourceType": st.just("OperationOutcome"), "issue": st.lists(ANYTHING, max_size=3)}
    ),
)


def answer(status: int, body: bytes) -> tuple[str, ...] | None:
    try:
        return read_answer(status, body, TARGET)
    except CrossReferenceError:
        return None


@given(STATUSES, st.binary(max_size=60))
def test_any_bytes_are_an_error(status: int, body: bytes) -> None:
    """What is no resource says nothing of anybody."""
    assert answer(status, body) is None


@given(STATUSES, RESOURCE)
def test_any_resource_is_an_answer_or_an_error(status: int, resource: Any) -> None:
    """Nothing else is raised, IDs are of the domain asked for, and nobody is said in words."""
    found = answer(status, json.dumps(resource).encode())
    if found is None:
        return
    assert isinstance(resource, dict)
    if found:
        assert status == 200
        theirs = [one.get("valueIdentifier") for one in resource["parameter"]]
        said = {one["value"].strip() for one in theirs if one and one.get("system") == TARGET}
        assert set(found) == said
        assert "" not in found
    elif status == 200:
        assert resource["resourceType"] == "Parameters"
    else:
        assert status == 404
        assert "Identifier" in json.dumps(resource["issue"])


@pytest.mark.parametrize("depth", [1_000, 100_000])
def test_deep_nesting_is_an_error(depth: int) -> None:
    """A body within the limit can be nested deeper than a parser goes."""
    assert answer(200, b"[" * depth + b"]" * depth) is None
    assert answer(404, b'{"issue":' * depth + b"1" + b"}" * depth) is None
