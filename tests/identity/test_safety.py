"""Contradicting demographics keep two records apart; nothing else does, and names only report."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dataset.header import InstanceHeader
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import PatientId
from dicomproxy.identity.safety import (
    Comparison,
    Demographics,
    KnownPatients,
    Unverified,
    Verdict,
    compare,
    demographics_of,
    demographics_of_header,
    names_agree,
    valid_birth_date,
)
from tests.sentinel import PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME

AGREES, CONFLICT, UNVERIFIED = Verdict.AGREES, Verdict.CONFLICT, Verdict.UNVERIFIED


@pytest.mark.parametrize(
    ("local", "remote", "verdict", "contradictions"),
    [
        # birth date
        (("19500101", ""), ("19500101", ""), AGREES, ()),
        (("19500101", ""), ("19500102", ""), CONFLICT, ("birth_date",)),
        (("19500101", ""), ("1950.01.01", ""), AGREES, ()),
        (("19500101", ""), ("", ""), UNVERIFIED, ()),
        (("", ""), ("19500101", "M"), UNVERIFIED, ()),
        (("19500101", ""), ("19501301", ""), UNVERIFIED, ()),  # no month 13
        (("19500230", ""), ("19500101", ""), UNVERIFIED, ()),  # no 30 February
        (("19500101", ""), ("1950", ""), UNVERIFIED, ()),
        (("19500101", ""), ("19500101-19600101", ""), UNVERIFIED, ()),
        (("19500101", ""), ("00000000", ""), UNVERIFIED, ()),
        # sex
        (("", "M"), ("", "M"), AGREES, ()),
        (("", "M"), ("", "F"), CONFLICT, ("sex",)),
        (("", "F"), ("", "M"), CONFLICT, ("sex",)),
        (("", "M"), ("", "O"), UNVERIFIED, ()),
        (("", "O"), ("", "F"), UNVERIFIED, ()),
        (("", "M"), ("", "m "), AGREES, ()),
        (("", "M"), ("", "W"), UNVERIFIED, ()),
        # both
        (("19500101", "M"), ("19500101", "F"), CONFLICT, ("sex",)),
        (("19500101", "M"), ("19600101", "M"), CONFLICT, ("birth_date",)),
        (("19500101", "M"), ("19600101", "F"), CONFLICT, ("birth_date", "sex")),
        (("19500101", "M"), ("", "M"), AGREES, ()),
        (("19500101", "O"), ("19500101", "F"), AGREES, ()),
    ],
)
def test_two_present_valid_different_values_contradict(
    local: tuple[str, str],
    remote: tuple[str, str],
    verdict: Verdict,
    contradictions: tuple[str, ...],
) -> None:
    """A contradiction needs a valid value on both sides; one alone verifies nothing."""
    found = compare(Demographics("", *local), Demographics("", *remote))

    assert found == Comparison(verdict, contradictions)


def test_patient_of_whom_nothing_is_known_is_unverified() -> None:
    """Without a local record there is nothing to compare with, whatever the source says."""
    assert compare(None, Demographics("A^B", "19500101", "M")) == Comparison(UNVERIFIED)


@pytest.mark.parametrize(
    ("verdict", "shown", "withheld"),
    [(AGREES, True, True), (CONFLICT, False, False), (UNVERIFIED, True, False)],
)
def test_site_chooses_only_about_what_could_not_be_compared(
    verdict: Verdict, shown: bool, withheld: bool
) -> None:
    """A contradiction is never shown, agreement always; between them the site decides."""
    assert Comparison(verdict).permits(Unverified.SHOW) is shown
    assert Comparison(verdict).permits(Unverified.WITHHOLD) is withheld


def test_name_never_blocks() -> None:
    """Another name is reported beside a verdict that it does not change."""
    ours = Demographics("Doe^Jane", "19500101", "F")

    assert compare(ours, Demographics("Roe^Mary", "19500101", "F")) == Comparison(
        AGREES, (), name_differs=True
    )
    assert compare(ours, Demographics("Roe^Mary", "", "")).verdict is UNVERIFIED


def test_what_is_logged_holds_no_value() -> None:
    """Neither representations nor the outcome of a comparison carry what was compared."""
    ours = Demographics(PATIENT_NAME, PATIENT_BIRTH_DATE, "M")
    outcome = compare(ours, Demographics("X^Y", "19500101", "F"))

    shown = f"{ours!r} {ours} {outcome!r}"
    assert PATIENT_NAME not in shown
    assert PATIENT_BIRTH_DATE not in shown


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("", "Doe^John"),
        ("Doe^John", "DOE^JOHN"),
        ("Doe^John", "Doe^John^^^"),
        ("Doe^John", " Doe ^ John "),
        ("Doe^John^^Dr", "Doe^John"),
        ("Doe^John^Quincy", "Doe^John"),
        ("Müller^Jürgen", "MUELLER^JUERGEN"),
        ("Müller^Jürgen", "Muller^Jurgen"),
        ("Mu\u0308ller^Jürgen", "Müller^Jürgen"),
        ("Strauß^Eva", "STRAUSS^EVA"),
        ("Sørensen^Åse", "Soerensen^Aase"),
        ("Łukasz^Jan", "Lukasz^Jan"),
        ("O'Brien^Ann-Marie", "OBRIEN^ANN MARIE"),
        ("Иванов^Фёдор", "ИВАНОВ^ФЕДОР"),
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", "YAMADA^TAROU"),
        ("Işık^İnci", "ISIK^INCI"),
        ("Þórsson^Guðrún", "THORSSON^GUDRUN"),
        ("Yamada^Tarou=山田^太郎", "Yamada^Taro=山田^太郎"),  # written in Latin in many ways
        ("Yamada^Tarou==やまだ^たろう", "Yamada^Taro==やまだ^たろう"),
        ("=山田^太郎", "Yamada^Tarou"),  # no group in common
        ("ﾔﾏﾀﾞ^ﾀﾛｳ", "ヤマダ^タロウ"),
        ("Ａｄａ^Ｂ", "ADA^B"),
    ],
)
def test_name_spelt_differently_is_no_difference(ours: str, theirs: str) -> None:
    """Case, accents, width, titles and missing component groups are no difference, either way."""
    assert names_agree(ours, theirs)
    assert names_agree(theirs, ours)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Doe^John", "Roe^John"),
        ("Doe^John", "Doe^Jane"),
        ("Doe^John", "John^Doe"),
        ("Doe^John^Quincy", "Doe^John^Adam"),
        ("Doe^John", "Doe"),
        ("Yamada^Tarou=山田^太郎", "Suzuki^Jirou=鈴木^次郎"),
        ("=山田^太郎", "=鈴木^太郎"),
        ("Satou^Ken=佐藤^健", "Satou^Ken=左藤^健"),  # sounds the same, and is somebody else
        ("ハタ^タロウ", "バタ^タロウ"),  # a voiced kana is another one
        ("Иванов^Иван", "Петров^Иван"),
    ],
)
def test_another_name_is_a_difference(ours: str, theirs: str) -> None:
    """Another family, given or middle name is told, either way."""
    assert not names_agree(ours, theirs)
    assert not names_agree(theirs, ours)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_names_compare(ours: str, theirs: str) -> None:
    """Whatever a name holds, comparing works, is symmetric, and a name agrees with itself."""
    assert names_agree(ours, ours)
    assert names_agree(ours, theirs) == names_agree(theirs, ours)


@given(st.dates())
def test_every_date_is_valid_as_da(day: object) -> None:
    """A DA of a date of the calendar is that date."""
    text = str(day).replace("-", "")
    assert str(valid_birth_date(text)) == str(day)


@given(st.text(max_size=12))
def test_any_birth_date_is_valid_or_not(text: str) -> None:
    """Whatever stands there, it is a date or none, without an error."""
    valid_birth_date(text)


def test_demographics_are_read_from_answers_and_headers() -> None:
    """What an answer or an instance says is taken as it is."""
    answer = Identifier()
    answer.set_text(0x00100010, PATIENT_NAME)
    answer.set_text(0x00100030, PATIENT_BIRTH_DATE)
    answer.set_text(0x00100040, "F")
    header = InstanceHeader("", "", "", "", PATIENT_ID, "", PATIENT_BIRTH_DATE, "F")

    assert demographics_of(answer) == Demographics(PATIENT_NAME, PATIENT_BIRTH_DATE, "F")
    assert demographics_of_header(header) == Demographics("", PATIENT_BIRTH_DATE, "F")
    assert demographics_of(Identifier()) == Demographics()
    assert not Demographics(PATIENT_NAME, "1950", "O").comparable
    assert Demographics(birth_date="19500101").comparable
    assert Demographics(sex="F").comparable


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


ONE, TWO, THREE = PatientId("1"), PatientId("2"), PatientId("3")


def test_learnt_demographics_hold_for_a_while() -> None:
    """What the local PACS said is known until its time is over, counted from the last answer."""
    clock = Clock()
    known = KnownPatients(clock, seconds=10)
    known.learn(ONE, Demographics(sex="F"))
    clock.now = 9
    assert known.of(ONE) == Demographics(sex="F")
    known.learn(ONE, Demographics(birth_date="19500101"))
    clock.now = 18
    assert known.of(ONE) == Demographics(birth_date="19500101", sex="F")
    clock.now = 19
    assert known.of(ONE) is None
    assert len(known) == 0


def test_memory_of_patients_is_bounded() -> None:
    """The one not used longest is forgotten when there are too many."""
    known = KnownPatients(Clock(), most=2)
    known.learn(ONE, Demographics(sex="F"))
    known.learn(TWO, Demographics(sex="M"))
    known.of(ONE)
    known.learn(THREE, Demographics(sex="M"))

    assert known.of(TWO) is None
    assert known.of(ONE) == Demographics(sex="F")
    assert len(known) == 2


def test_forgotten_patient_has_to_be_asked_for() -> None:
    """A merged record is compared with nothing that was known before."""
    known = KnownPatients(Clock())
    for patient in (ONE, TWO, THREE):
        known.learn(patient, Demographics(sex="F"))

    known.forget([ONE, PatientId("stranger")])
    assert (known.of(ONE), known.of(TWO)) == (None, Demographics(sex="F"))
    known.forget_all()
    assert len(known) == 0
