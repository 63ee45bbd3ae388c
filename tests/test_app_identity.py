"""Identity across a reload: it comes, it changes, and what cannot be read changes nothing."""

from __future__ import annotations

from pathlib import Path

from dicomproxy.dataset.patient import Domain, PatientId
from tests.sentinel import PATIENT_ID
from tests.support.log_watch import LogWatch
from tests.test_app import File, configured_logs, running

__all__ = ["configured_logs"]  # a fixture

ME = PatientId(PATIENT_ID, Domain("HOSPITAL"))


async def test_identity_comes_and_goes_with_a_reload(tmp_path: Path, log_watch: LogWatch) -> None:
    """New associations follow it; without a word of it in the file there is none."""
    file = File(tmp_path)
    (tmp_path / "ids.csv").write_text(f"local,north\n{PATIENT_ID},2\n")
    async with running(file) as application:
        assert application.routing is not None
        assert application.routing.identity is None
        file.content["local"]["patient_id_issuer"] = "HOSPITAL"
        file.content["sources"][0]["patient_id_issuer"] = "NORTH"
        file.content["sources"][0]["identity"] = {"cross_reference": "regional"}
        file.content["cross_references"] = [
            {"name": "regional", "type": "table", "file": "ids.csv"}
        ]
        file.write()
        assert await application.reload()
        identity = application.routing.identity
        assert identity is not None
        await application.routing._identity._tables[0].look()  # type: ignore[union-attr]
        found = await identity.identities.elsewhere(ME, "north")
        assert found == (PatientId("2", Domain("NORTH")),)
        file.content["cross_references"][0] |= {
            "type": "pixm",
            "url": "https://127.0.0.1/fhir",
            "file": None,
            "authorization_file": "missing",
        }
        for place, oid in ((file.content["local"], "1.2.1"), (file.content["sources"][0], "1.2.2")):
            place["patient_id_issuer"] = {"universal_id": oid}
        file.write()
        assert not await application.reload()
        assert application.routing.identity is identity
        assert len(log_watch.named("reload_refused")) == 1
