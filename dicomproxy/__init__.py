"""A DICOM proxy that makes remote priors look local.

It stands between unchanged workstations and their PACS. A query is answered
with the local studies and with the patient's studies held elsewhere in the
region; opening a remote one fetches it and delivers it as the local PACS would.

The rooms, from the network inwards::

    cli/           commands: serve, demo, check, doctor, cache
    demo/          an embedded region for the demo; talks to the proxy over DICOM only
    app.py         wiring: construct, validate, start; stop in reverse
    config/        one YAML file becomes values, once, at the door

    services/      edge, we are SCP: echo, find, move, store, relay, access control
    web/           edge: health, metrics, status page
      |
    query/         one C-FIND becomes many; their matches become one answer
    retrieval/     flights fetch studies into the cache, deliveries send from it
      |
    identity/      who a patient is elsewhere, and what makes a prior look local
    dataset/       identifiers, levels, character sets, headers; pure
    ports.py       what query and retrieval ask of the edges below
      ^
    sources/       edge, we ask: archives that hold studies
    destinations/  edge, we deliver: workstations
    cache/         edge: instances on disk, grouped by study
    state/         edge: where each study was seen
    audit/         edge: the durable record of disclosures

    dimse/         upper layer and DIMSE on asyncio, under services, sources and
                   destinations; knows nothing of priors
    hl7/           HL7 v2 messages and MLLP, under identity; knows no patient, only fields
    logs.py        structured logs without patient values; anyone may import it
    tasks.py       tasks with a name and an owner; likewise

Imports go downwards only, edges never import one another, and every foreign
package has its room; ``tests/test_architecture.py`` holds all of this.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dicomproxy")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.1.0"
