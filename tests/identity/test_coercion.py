"""A foreign object looks local, and still says what it was."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from pydicom import Dataset, Sequence, dcmread
from pydicom.dataset import FileDataset
from pydicom.uid import UID

from dicomproxy.dataset.header import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
)
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.part10 import build_file_meta
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.accession import Shown
from dicomproxy.identity.coercion import (
    Code,
    Coercer,
    CoercionSettings,
    LocalPatient,
    accession_numbers,
    coerce,
    coerce_answer,
)
from dicomproxy.identity.safety import Demographics
from tests.sentinel import ACCESSION_NUMBER, PATIENT_ID, PATIENT_NAME
from tests.support.datasets import data_set_bytes, instance, real_files

NORTH = Domain("NORTH", "1.2.3.1", "ISO")
HERE = Domain("HERE", "1.2.3.9", "ISO")
AT = datetime(2024, 2, 3, 4, 5, 6, tzinfo=UTC)
LOCAL = LocalPatient(PatientId("L-1", HERE), Demographics("Local^Name", "19701231", "F"))
SETTINGS = CoercionSettings("north", "DICOMPROXY", NORTH)
ACCESSIONS = {ACCESSION_NUMBER: Shown("X123", HERE), "NEST1": Shown("X456")}


def coerced_bytes(
    dataset: Dataset,
    patient: LocalPatient | None = LOCAL,
    settings: CoercionSettings = SETTINGS,
    accessions: Any = ACCESSIONS,
    destination: str = "",
) -> bytes:
    data = data_set_bytes(dataset)
    coercer = Coercer(patient, settings, accessions, AT, destination)
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    made = coercer.rewrite(lambda at, size: data[at : at + size], len(data), syntax)
    result = b"".join(made.chunks())
    assert len(result) == made.total_bytes
    return result


def coerced(dataset: Dataset, *arguments: Any, **more: Any) -> FileDataset:
    """Coerce *dataset* as it is encoded, and have pydicom read what comes out."""
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    head = build_file_meta(dataset.SOPClassUID, dataset.SOPInstanceUID, syntax)
    return dcmread(io.BytesIO(head + coerced_bytes(dataset, *arguments, **more)))


def item(**elements: Any) -> Dataset:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def previous(dataset: Dataset) -> Dataset:
    """Return the previous values that the last coercion has kept."""
    (kept,) = dataset.OriginalAttributesSequence[-1].ModifiedAttributesSequence
    assert isinstance(kept, Dataset)
    return kept


# ----------------------------------------------------------------------- the patient


@pytest.mark.parametrize(
    "syntax",
    [
        IMPLICIT_VR_LITTLE_ENDIAN,
        EXPLICIT_VR_LITTLE_ENDIAN,
        EXPLICIT_VR_BIG_ENDIAN,
        DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
        "1.2.840.10008.1.2.4.70",
    ],
)
def test_the_patient_is_the_local_one(syntax: str) -> None:
    """ID, issuer, name, birth date and sex are local, whatever the transfer syntax."""
    found = coerced(instance(transfer_syntax_uid=syntax))

    assert found.PatientID == "L-1"
    assert found.IssuerOfPatientID == "HERE"
    (qualifiers,) = found.IssuerOfPatientIDQualifiersSequence
    assert (qualifiers.UniversalEntityID, qualifiers.UniversalEntityIDType) == ("1.2.3.9", "ISO")
    assert found.PatientName == "Local^Name"
    assert (found.PatientBirthDate, found.PatientSex) == ("19701231", "F")


def test_the_foreign_id_is_kept_with_its_issuer() -> None:
    """Other Patient IDs Sequence receives it, once, behind what is there already."""
    other = item(PatientID="9", IssuerOfPatientID="EAST", TypeOfPatientID="TEXT")
    found = coerced(instance(OtherPatientIDsSequence=Sequence([other])))

    first, second = found.OtherPatientIDsSequence
    assert (first.PatientID, first.IssuerOfPatientID) == ("9", "EAST")
    assert (second.PatientID, second.IssuerOfPatientID) == (PATIENT_ID, "NORTH")
    assert second.IssuerOfPatientIDQualifiersSequence[0].UniversalEntityID == "1.2.3.1"
    assert second.TypeOfPatientID == "TEXT"
    assert coerced(found).OtherPatientIDsSequence == found.OtherPatientIDsSequence


def test_what_kind_of_id_the_foreign_one_is_goes_with_it() -> None:
    """The local ID is not said to be read from a wristband because the foreign one was."""
    found = coerced(instance(TypeOfPatientID="BARCODE"))

    assert "TypeOfPatientID" not in found
    assert found.OtherPatientIDsSequence[0].TypeOfPatientID == "BARCODE"
    assert previous(found).TypeOfPatientID == "BARCODE"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        # Without an issuer it is one of the source's own.
        ({"PatientID": "9"}, [("9", "NORTH"), (PATIENT_ID, "NORTH")]),
        # What the local domain's IDs are is not for others to say.
        ({"PatientID": "L-2", "IssuerOfPatientID": "HERE"}, [(PATIENT_ID, "NORTH")]),
        # The foreign ID itself, listed already.
        ({"PatientID": PATIENT_ID, "IssuerOfPatientID": "NORTH"}, [(PATIENT_ID, "NORTH")]),
        ({"PatientID": PATIENT_ID}, [(PATIENT_ID, "NORTH")]),
    ],
)
def test_other_ids_are_qualified(other: dict[str, str], expected: list[tuple[str, str]]) -> None:
    """No ID is left of which it could be thought that it is one of ours."""
    found = coerced(
        instance(OtherPatientIDs="7", OtherPatientIDsSequence=Sequence([item(**other)]))
    )

    items = found.OtherPatientIDsSequence
    assert [(one.PatientID, one.IssuerOfPatientID) for one in items] == expected
    assert "OtherPatientIDs" not in found
    assert previous(found).OtherPatientIDs == "7"


def test_an_issuer_of_the_object_is_believed_over_the_configured_one() -> None:
    """The foreign ID keeps the domain that the object names."""
    found = coerced(instance(IssuerOfPatientID="WEST"))

    assert found.OtherPatientIDsSequence[0].IssuerOfPatientID == "WEST"
    assert previous(found).IssuerOfPatientID == "WEST"


def test_an_issuer_that_means_nothing_is_not_believed() -> None:
    """Where the site says so, the configured domain counts, and what was written is recorded."""
    settings = CoercionSettings("north", "DICOMPROXY", NORTH, ignore_issuers=True)
    found = coerced(instance(IssuerOfPatientID="HERE"), settings=settings)

    assert found.OtherPatientIDsSequence[0].IssuerOfPatientID == "NORTH"
    assert previous(found).IssuerOfPatientID == "HERE"


def test_a_domain_without_a_namespace_leaves_no_foreign_one() -> None:
    """A local ID never stands beside a foreign issuer."""
    patient = LocalPatient(PatientId("L-1", Domain("", "1.2.3.9", "ISO")))
    found = coerced(instance(IssuerOfPatientID="NORTH"), patient)

    assert "IssuerOfPatientID" not in found
    assert found.IssuerOfPatientIDQualifiersSequence[0].UniversalEntityID == "1.2.3.9"
    assert previous(found).IssuerOfPatientID == "NORTH"


def test_without_named_domains_an_equal_id_is_the_same() -> None:
    """Where a site names no domains nothing is said about issuers that an object names."""
    patient = LocalPatient(PatientId(PATIENT_ID))
    settings = CoercionSettings("north", "DICOMPROXY", keep_study_id=True)
    dataset = instance(IssuerOfPatientID="NORTH")

    assert coerced_bytes(dataset, patient, settings, None) == data_set_bytes(dataset)


def test_unknown_demographics_are_left_as_they_are() -> None:
    """Only the ID is replaced while nothing else is known of the local patient."""
    found = coerced(instance(), LocalPatient(LOCAL.patient_id))

    assert found.PatientID == "L-1"
    assert found.PatientName == PATIENT_NAME


def test_what_the_local_patient_does_not_have_is_emptied() -> None:
    """A birth date that the local PACS does not know is not shown beside its patient."""
    patient = LocalPatient(LOCAL.patient_id, Demographics("Local^Name"))
    found = coerced(instance(), patient)

    assert (found.PatientBirthDate, found.PatientSex) == ("", "")
    assert previous(found).PatientSex == "O"


def test_no_patient_and_no_accessions_leave_identity_alone() -> None:
    """Without anything to say, and Study ID kept, the object is copied."""
    dataset = instance()
    settings = CoercionSettings("north", "DICOMPROXY", NORTH, keep_study_id=True)

    assert coerced_bytes(dataset, None, settings, None) == data_set_bytes(dataset)


# ------------------------------------------------------------------------- requests


def requested() -> Dataset:
    return instance(
        IssuerOfAccessionNumberSequence=Sequence([item(LocalNamespaceEntityID="N")]),
        PlacerOrderNumberImagingServiceRequest="P1",
        RequestAttributesSequence=Sequence(
            [
                item(
                    AccessionNumber="NEST1",
                    RequestedProcedureID="RP1",
                    RequestedProcedureDescription="CT Thorax",
                    ScheduledProcedureStepID="SPS1",
                ),
                item(RequestedProcedureID="RP2"),
            ]
        ),
        ReferencedRequestSequence=Sequence(
            [
                item(
                    StudyInstanceUID="1.2.3",
                    AccessionNumber="UNKNOWN",
                    PlacerOrderNumberImagingServiceRequest="P1",
                    FillerOrderNumberImagingServiceRequest="F1",
                    OrderFillerIdentifierSequence=Sequence([item(LocalNamespaceEntityID="N")]),
                    RequestedProcedureID="RP1",
                )
            ]
        ),
    )


def test_accession_numbers_are_local_wherever_they_stand() -> None:
    """At the top and in requests; one that nobody has a local number for is emptied."""
    found = coerced(requested())

    assert found.AccessionNumber == "X123"
    (issuer,) = found.IssuerOfAccessionNumberSequence
    assert (issuer.LocalNamespaceEntityID, issuer.UniversalEntityID) == ("HERE", "1.2.3.9")
    (request,) = found.RequestAttributesSequence
    assert request.AccessionNumber == "X456"
    (referenced,) = found.ReferencedRequestSequence
    assert referenced.AccessionNumber == ""


def test_identifiers_of_requests_do_not_reach_readers() -> None:
    """They may equal local ones; what was requested stays."""
    found = coerced(requested())

    (request,) = found.RequestAttributesSequence
    assert request.RequestedProcedureDescription == "CT Thorax"
    assert "RequestedProcedureID" not in request
    assert "ScheduledProcedureStepID" not in request
    (referenced,) = found.ReferencedRequestSequence
    assert referenced.StudyInstanceUID == "1.2.3"
    assert referenced.RequestedProcedureID == ""
    assert referenced.PlacerOrderNumberImagingServiceRequest == ""
    assert referenced.FillerOrderNumberImagingServiceRequest == ""
    assert "OrderFillerIdentifierSequence" not in referenced
    assert found.PlacerOrderNumberImagingServiceRequest == ""
    assert found.StudyID == ""


def test_a_changed_nested_value_keeps_the_whole_previous_sequence() -> None:
    """Each sequence is recorded as it was, all items and all attributes of them."""
    dataset = requested()
    kept = previous(coerced(dataset))

    for keyword in (
        "RequestAttributesSequence",
        "ReferencedRequestSequence",
        "IssuerOfAccessionNumberSequence",
    ):
        assert kept[keyword].value == dataset[keyword].value, keyword
    assert kept.AccessionNumber == ACCESSION_NUMBER


def test_kept_accession_numbers_leave_requests_alone() -> None:
    """Where the source shares our numbers, requests are ours as well."""
    dataset = requested()
    found = coerced(dataset, accessions=None)

    assert found.AccessionNumber == ACCESSION_NUMBER
    assert found.RequestAttributesSequence == dataset.RequestAttributesSequence
    assert "AccessionNumber" not in previous(found)


def test_every_accession_number_of_an_object_is_named() -> None:
    """So that each can be given a local one before the object is coerced."""
    view = Identifier.from_dataset(requested())

    assert accession_numbers(view) == {
        ACCESSION_NUMBER: Domain("N"),
        "NEST1": Domain(),
        "UNKNOWN": Domain(),
    }


# --------------------------------------------------------------- descriptions, codes


DESCRIBED = CoercionSettings(
    "north",
    "DICOMPROXY",
    NORTH,
    study_description_prefix="[N] ",
    descriptions={"CT Thorax": "CT Chest", "synthetic": "CT Head"},
    procedure_codes={
        ("123", "99N"): Code("CTC", "99HERE", "CT Chest"),
        ("A code longer than sixteen", "99N"): Code("LONGER-THAN-SIXTEEN", "99HERE", "CT Head"),
    },
)


def test_descriptions_become_local_ones_with_a_mark() -> None:
    """Hanging protocols know the local name, readers see where the study is from."""
    found = coerced(requested(), settings=DESCRIBED)

    assert found.StudyDescription == "[N] CT Head"
    assert found.RequestAttributesSequence[0].RequestedProcedureDescription == "CT Chest"
    assert previous(found).StudyDescription == "synthetic"
    assert coerced(found, settings=DESCRIBED).StudyDescription == "[N] CT Head"


@pytest.mark.parametrize(
    ("description", "expected"),
    [(None, "[N]"), ("", "[N]"), ("x" * 64, "[N] " + "x" * 60), ("[N] a", "[N] a"), ("[N]", "[N]")],
)
def test_the_mark_fits_any_description(description: str | None, expected: str) -> None:
    """Absent, empty, as long as can be, or marked before."""
    found = coerced(instance(StudyDescription=description), settings=DESCRIBED)
    assert found.StudyDescription == expected


def test_procedure_codes_become_local_ones() -> None:
    """By value and scheme, long values too; codes that are not in the map stay."""
    code = item(CodeValue="123", CodingSchemeDesignator="99N", CodeMeaning="Thorax")
    foreign = item(CodeValue="123", CodingSchemeDesignator="99X", CodeMeaning="other")
    long = item(LongCodeValue="A code longer than sixteen", CodingSchemeDesignator="99N")
    request = item(RequestedProcedureCodeSequence=Sequence([code]))
    dataset = instance(
        ProcedureCodeSequence=Sequence([code, foreign, long]),
        RequestAttributesSequence=Sequence([request]),
    )
    found = coerced(dataset, settings=DESCRIBED)

    first, second, third = found.ProcedureCodeSequence
    assert (first.CodeValue, first.CodingSchemeDesignator, first.CodeMeaning) == (
        "CTC",
        "99HERE",
        "CT Chest",
    )
    assert second == foreign
    assert third.LongCodeValue == "LONGER-THAN-SIXTEEN"
    nested = found.RequestAttributesSequence[0].RequestedProcedureCodeSequence[0]
    assert nested.CodeValue == "CTC"
    assert previous(found).ProcedureCodeSequence == dataset.ProcedureCodeSequence


# ----------------------------------------------------------------------- the record


def test_the_record_says_who_changed_what_and_when() -> None:
    """One item, with all that PS3.3 C.12.1.1.9 asks for, and the time on the instance."""
    found = coerced(instance())

    (record,) = found.OriginalAttributesSequence
    assert record.AttributeModificationDateTime == "20240203040506+0000"
    assert record.ModifyingSystem == "DICOMPROXY"
    assert record.SourceOfPreviousValues == "north"
    assert record.ReasonForTheAttributeModification == "COERCE"
    assert found.InstanceCoercionDateTime == "20240203040506+0000"
    kept = previous(found)
    assert (kept.PatientID, kept.PatientName) == (PATIENT_ID, PATIENT_NAME)
    assert (kept.PatientBirthDate, kept.PatientSex) == ("19010203", "O")
    assert "IssuerOfPatientID" in kept
    assert not kept.IssuerOfPatientID
    assert list(kept.OtherPatientIDsSequence) == []


def test_the_proxy_is_among_the_contributing_equipment() -> None:
    """Readers see that something was changed on the way, by whom and when, behind who was first."""
    scanner = item(Manufacturer="SCANNERS", ContributionDateTime="20200101")
    dataset = instance(ContributingEquipmentSequence=Sequence([scanner]))
    found = coerced(dataset)

    first, equipment = found.ContributingEquipmentSequence
    assert first == scanner
    (purpose,) = equipment.PurposeOfReferenceCodeSequence
    assert (purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning) == (
        "109103",
        "DCM",
        "Modifying Equipment",
    )
    assert equipment.Manufacturer
    assert equipment.StationName == "DICOMPROXY"
    assert equipment.ContributionDateTime == "20240203040506+0000"
    assert previous(found).ContributingEquipmentSequence == Sequence([scanner])


def test_an_unchanged_issuer_is_recorded_with_a_changed_id() -> None:
    """An ID without whose it is would be worth nothing."""
    dataset = instance(
        IssuerOfPatientID="HERE",
        IssuerOfPatientIDQualifiersSequence=Sequence(
            [item(UniversalEntityID="1.2.3.9", UniversalEntityIDType="ISO")]
        ),
    )
    found = coerced(dataset)

    assert found.IssuerOfPatientID == "HERE"
    assert previous(found).IssuerOfPatientID == "HERE"
    kept = previous(found).IssuerOfPatientIDQualifiersSequence
    assert kept == dataset.IssuerOfPatientIDQualifiersSequence


def test_earlier_records_are_kept() -> None:
    """A second coercion adds its item behind the first."""
    earlier = item(
        ModifiedAttributesSequence=Sequence([item(PatientID="0")]),
        AttributeModificationDateTime="20200101",
        ModifyingSystem="OTHER",
        SourceOfPreviousValues="",
        ReasonForTheAttributeModification="CORRECT",
    )
    found = coerced(instance(OriginalAttributesSequence=Sequence([earlier])))

    assert len(found.OriginalAttributesSequence) == 2
    assert found.OriginalAttributesSequence[0] == earlier


@pytest.mark.parametrize("syntax", [EXPLICIT_VR_LITTLE_ENDIAN, "1.2.840.10008.1.2.4.70"])
def test_signatures_go_with_what_they_signed(syntax: str) -> None:
    """They would not hold any more; the record has them."""
    dataset = instance(
        transfer_syntax_uid=syntax,
        MACParametersSequence=Sequence([item(MACIDNumber=1)]),
        DigitalSignaturesSequence=Sequence([item(MACIDNumber=1, Signature=b"1234")]),
    )
    found = coerced(dataset)

    assert "MACParametersSequence" not in found
    assert "DigitalSignaturesSequence" not in found
    assert previous(found).MACParametersSequence == dataset.MACParametersSequence
    assert previous(found).DigitalSignaturesSequence == dataset.DigitalSignaturesSequence
    assert found.PixelData == dataset.PixelData
    settings = CoercionSettings("north", "DICOMPROXY", NORTH, keep_study_id=True)
    assert coerced_bytes(dataset, None, settings, None) == data_set_bytes(dataset)


def test_the_same_input_gives_the_same_bytes() -> None:
    """Two coercions of one object are one object."""
    dataset = requested()
    assert coerced_bytes(dataset, settings=DESCRIBED) == coerced_bytes(dataset, settings=DESCRIBED)


def test_a_local_object_stays_as_it_is() -> None:
    """Where all is local already there is no edit, and nothing to record."""
    dataset = coerced(instance())
    view = Identifier.from_dataset(dataset)
    view.remove(0x7FE00010)

    assert coerce(view, LOCAL, SETTINGS, None, AT).edits == {}


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, about what is odd in its files
@pytest.mark.parametrize("one", real_files(), ids=lambda one: one.name)
def test_uids_and_pixels_of_real_files_are_untouched(one: Any) -> None:
    """Whatever the object, its UIDs and its pixels are those of the original."""
    data = one.data_set_bytes()
    coercer = Coercer(LOCAL, DESCRIBED, ACCESSIONS, AT)
    made = coercer.rewrite(
        lambda at, size: data[at : at + size], len(data), one.transfer_syntax_uid
    )
    head = one.path.read_bytes()[: one.data_set_offset]
    found = dcmread(io.BytesIO(head + b"".join(made.chunks())))
    original = dcmread(one.path)

    assert found.PatientID == "L-1"
    assert found.PatientName == "Local^Name"
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        assert found.get(keyword) == original.get(keyword)
    for keyword in ("PixelData", "InstitutionName", "WaveformSequence", "ContentSequence"):
        assert found.get(keyword) == original.get(keyword)
    assert previous(found).get("PatientID") == (original.get("PatientID") or "")


# ---------------------------------------------------------------------- answers


def test_an_answer_says_what_the_object_will_say() -> None:
    """For every key that was asked for, the answer has the value of the delivered object."""
    dataset = requested()
    object_ = coerced(dataset, settings=DESCRIBED)
    row = Identifier.from_dataset(dataset)
    row.remove(0x7FE00010)

    answer = coerce_answer(row, LOCAL, DESCRIBED, ACCESSIONS).to_dataset()

    assert [element.tag for element in answer] == [element.tag for element in row]
    for element in answer:
        if element.tag in object_:
            assert element.value == object_[element.tag].value, element.tag
        else:
            assert not element.value, element.tag


def test_an_answer_has_no_key_that_was_not_asked_for() -> None:
    """Neither the issuer nor other IDs come uninvited, and what goes stays as an empty key."""
    row = Identifier.from_dataset(
        item(PatientID=PATIENT_ID, StudyID="7", OtherPatientIDs="5", StudyInstanceUID="1.2")
    )
    answer = coerce_answer(row, LOCAL, DESCRIBED, ACCESSIONS)

    assert [element.tag for element in answer] == [element.tag for element in row]
    assert answer.text(0x00100020) == "L-1"
    assert answer.is_empty(0x00101000)
    assert row.text(0x00100020) == PATIENT_ID


def test_nobody_is_made_a_patient_without_an_id() -> None:
    """An object never loses its Patient ID for want of a local one."""
    with pytest.raises(ValueError):
        LocalPatient(PatientId("", HERE))


# ------------------------------------------------------------------- what is logged


@pytest.mark.parametrize("make", [lambda: LOCAL, lambda: Shown(ACCESSION_NUMBER)])
def test_representations_name_no_patient(make: Callable[[], object]) -> None:
    """What might end in a log says nothing of anybody."""
    assert "L-1" not in repr(make())
    assert ACCESSION_NUMBER not in repr(make())


def test_big_endian_objects_keep_their_syntax() -> None:
    """What is inserted is written as what is around it."""
    dataset = instance(rows=4, columns=4)
    dataset.file_meta.TransferSyntaxUID = UID(EXPLICIT_VR_BIG_ENDIAN)
    found = coerced(dataset)
    assert (found.Rows, found.PatientID) == (4, "L-1")
