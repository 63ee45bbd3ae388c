"""Any bytes are a journal; what was written whole is read back, what was torn is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.cache.journal import (
    Journal,
    add_line,
    complete_line,
    parse_journal,
    pin_line,
    read_journal,
    remove_line,
    study_line,
)
from dicomproxy.cache.layout import instance_name
from dicomproxy.ports import CachedInstance


def held(uid: str, size: int = 10) -> CachedInstance:
    return CachedInstance(
        "1.2.840", uid, "1.2.3", "1.2.3.1", "1.2.840.1", "north", instance_name(uid), 330, size, 7
    )


_UIDS = st.sampled_from(["1.1", "1.2", "1.3"])
_LINES = st.one_of(
    st.builds(lambda uid, size: add_line(held(uid, size)), _UIDS, st.integers(0, 2**40)),
    st.builds(remove_line, _UIDS),
    st.builds(complete_line, st.booleans(), st.integers(0, 3)),
    st.builds(pin_line, st.booleans()),
)


@given(st.binary(max_size=2000))
def test_any_bytes_give_a_result(data: bytes) -> None:
    """Nothing raises, and no instance comes out of noise."""
    content = parse_journal(data)
    assert content.instances == {}
    assert 0 <= content.end <= len(data)


@given(st.lists(_LINES, max_size=12), st.data())
def test_journal_cut_anywhere_says_what_its_whole_lines_say(
    lines: list[bytes], data: st.DataObject
) -> None:
    """A torn last line counts as not written, wherever it was torn."""
    whole = [study_line("1.2.3"), *lines]
    text = b"".join(whole)
    cut = data.draw(st.integers(0, len(text)))
    kept, end = 0, 0
    for line in whole:
        if end + len(line) > cut:
            break
        kept, end = kept + 1, end + len(line)
    content = parse_journal(text[:cut])
    expected = parse_journal(b"".join(whole[:kept]))
    assert content.instances == expected.instances
    assert (content.complete, content.pinned, content.end) == (
        expected.complete,
        expected.pinned,
        end,
    )


@given(st.lists(_LINES, min_size=1, max_size=12), st.data())
def test_changed_byte_voids_its_line_only(lines: list[bytes], data: st.DataObject) -> None:
    """Rot in one line leaves the others as they were."""
    whole = [study_line("1.2.3"), *lines]
    index = data.draw(st.integers(1, len(lines)))
    at = data.draw(st.integers(0, len(whole[index]) - 2))
    line = bytearray(whole[index])
    line[at] ^= 1 if line[at] not in (0x0B, 0x0C) else 0x40
    content = parse_journal(b"".join([*whole[:index], bytes(line), *whole[index + 1 :]]))
    expected = parse_journal(b"".join(whole[:index] + whole[index + 1 :]))
    assert content.instances == expected.instances
    assert content.torn >= 1


def test_completeness_needs_the_number_of_instances() -> None:
    """A study whose earlier lines are lost is not whole, whatever a later line says."""
    lines = [study_line("1.2.3"), add_line(held("1.1")), add_line(held("1.2"))]
    assert parse_journal(b"".join([*lines, complete_line(True, 2)])).complete
    assert not parse_journal(b"".join([lines[0], lines[2], complete_line(True, 2)])).complete


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_file_name_that_is_not_ours_is_no_instance(name: str) -> None:
    """No line makes the cache read or delete a file elsewhere."""
    instance = CachedInstance("1", "1.1", "1.2.3", "1.3", "1.4", "north", name, 330, 10, 7)
    content = parse_journal(study_line("1.2.3") + add_line(instance))
    assert content.instances == {}
    assert content.torn == 1


def test_lines_after_a_torn_one_are_read(tmp_path: Path) -> None:
    """A journal goes on where its last good line ended, so that nothing is joined to a torn one."""
    journal = Journal.open(tmp_path, "1.2.3")
    journal.append(add_line(held("1.1")))
    journal.close()
    with (tmp_path / "journal").open("ab") as file:
        file.write(add_line(held("1.2"))[:-20])
    journal = Journal.open(tmp_path, "1.2.3")
    journal.append(add_line(held("1.3")))
    journal.sync_later()()
    journal.close()
    content = read_journal(tmp_path)
    assert set(content.instances) == {"1.1", "1.3"}
    assert content.torn == 0
    assert content.size_bytes == 680
