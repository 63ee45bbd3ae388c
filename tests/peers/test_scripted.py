"""The scripted peer speaks DICOM as DCMTK understands it, and breaks it where told to."""

from __future__ import annotations

import asyncio

import pytest

from tests.peers import dcmtk
from tests.peers.ports import free_port
from tests.peers.scripted import (
    ABORT,
    ASSOCIATE_AC,
    ASSOCIATE_RQ,
    IMPLICIT_VR_LITTLE_ENDIAN,
    P_DATA,
    RELEASE_RP,
    RELEASE_RQ,
    Accept,
    Close,
    Do,
    Expect,
    ExpectEnd,
    Reset,
    ScriptBroken,
    ScriptedPeer,
    Send,
    Stall,
    abort,
    associate_rj,
    associate_rq,
    command_set,
    p_data,
    proposed_contexts,
    read_command_set,
    release_rp,
    release_rq,
)

VERIFICATION = "1.2.840.10008.1.1"
ECHO_RSP = command_set({0x0002: VERIFICATION, 0x0100: 0x8030, 0x0120: 1, 0x0800: 0x0101, 0x0900: 0})
ECHO_RQ = command_set({0x0002: VERIFICATION, 0x0100: 0x0030, 0x0110: 1, 0x0800: 0x0101})


@pytest.mark.peers
@pytest.mark.parametrize("piece", [0, 1])
async def test_echoscu_is_answered(piece: int) -> None:
    """DCMTK takes the script's association, answer and release, whole or byte by byte."""
    script = [
        Expect(ASSOCIATE_RQ),
        Accept(),
        Expect(P_DATA),
        Send(p_data(1, ECHO_RSP, command=True), piece),
        Expect(RELEASE_RQ),
        Send(release_rp(), piece),
        ExpectEnd(),
    ]
    async with ScriptedPeer(script) as peer:
        result = await dcmtk.echoscu(peer.node.port)
        connection = await peer.ended()

    assert (result.exit_code, result.final.status) == (0, 0x0000)
    assert proposed_contexts(connection.received[0])[1][0] == VERIFICATION
    # The PDV's 6 bytes of header follow the PDU's 6.
    assert read_command_set(connection.received[1][12:])[0x0100] == b"\x30\x00"


@pytest.mark.peers
async def test_storescp_answers_the_requestor() -> None:
    """As a requestor the script asks DCMTK for C-ECHO and is answered."""
    script = [
        Send(associate_rq({VERIFICATION: [IMPLICIT_VR_LITTLE_ENDIAN]})),
        Expect(ASSOCIATE_AC),
        Send(p_data(1, ECHO_RQ, command=True)),
        Expect(P_DATA),
        Send(release_rq()),
        Expect(RELEASE_RP),
    ]
    async with dcmtk.StoreScp("STORE") as store:
        connection = await ScriptedPeer(script).request(store.node)

    assert read_command_set(connection.received[1][12:])[0x0900] == b"\x00\x00"


@pytest.mark.peers
async def test_rejection_and_abort_are_understood() -> None:
    """DCMTK says that it was rejected, and that it was aborted."""
    rejecting = [Expect(ASSOCIATE_RQ), Send(associate_rj(2, 3, 2)), ExpectEnd()]
    aborting = [Expect(ASSOCIATE_RQ), Accept(), Expect(P_DATA), Send(abort()), ExpectEnd()]
    async with ScriptedPeer(rejecting, aborting) as peer:
        first = await dcmtk.echoscu(peer.node.port)
        second = await dcmtk.echoscu(peer.node.port)

    assert first.rejected
    assert not second.rejected
    assert "abort" in second.output.lower()


@pytest.mark.parametrize("last", [Close(), Reset()], ids=["close", "reset"])
async def test_connection_ends_in_the_middle_of_a_pdu(last: Close | Reset) -> None:
    """Closed in order the other side reads to the end; reset, it may read less and is told."""
    async with ScriptedPeer([Send(b"\x02\x00\x00\x00\x00\xff..."), Stall(), last]) as peer:
        reader, writer = await asyncio.open_connection(*peer.node[1:])
        await peer.stalled()
        peer.resume()
        async with asyncio.timeout(60):
            if isinstance(last, Close):
                assert await reader.read() == b"\x02\x00\x00\x00\x00\xff..."
            else:
                with pytest.raises(ConnectionResetError):
                    await reader.readexactly(100)
        writer.close()


async def test_unexpected_pdu_breaks_the_script_aloud() -> None:
    """Leaving the block raises if the other side did not do as expected."""
    with pytest.raises(ScriptBroken, match="PDU 7 where 1 was expected"):
        async with ScriptedPeer([Expect(ASSOCIATE_RQ)]) as peer:
            await ScriptedPeer([Send(abort()), ExpectEnd()]).request(peer.node)
            await peer.ended()


async def test_missing_pdu_breaks_the_script_aloud() -> None:
    """An end without the PDU that had to come before it is noticed."""
    with pytest.raises(ScriptBroken, match=f"without PDU {ABORT}"):
        async with ScriptedPeer([ExpectEnd(ABORT)]) as peer:
            await ScriptedPeer([Send(release_rq()), Close()]).request(peer.node)
            await peer.ended()


async def test_each_connection_plays_its_script_and_the_last_one_repeats() -> None:
    """The second connection gets the second script, and so does the third."""
    asked = []

    def echo(received: object) -> bytes:
        asked.append(received)
        return release_rp()

    async with ScriptedPeer([Send(abort())], [Expect(), Do(echo)]) as peer:
        kinds = []
        for script in ([Expect()], [Send(release_rq()), Expect()], [Send(release_rq()), Expect()]):
            connection = await ScriptedPeer(script).request(peer.node)
            kinds.append(connection.kinds)

    assert kinds == [[ABORT], [RELEASE_RP], [RELEASE_RP]]
    assert len(asked) == 2


async def test_requestor_that_reaches_nobody_is_refused() -> None:
    """Without a listener there is no connection."""
    with pytest.raises(ConnectionRefusedError):
        await ScriptedPeer([Close()]).request(("NOBODY", "127.0.0.1", free_port()))
