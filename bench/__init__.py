"""The benchmark: how long a workstation waits, beside what it would wait without the proxy.

Run as ``python -m bench`` or ``make bench``; ``docs/performance.md`` says how
to read it. Rule kept: every row compares two things that were measured in turn
in the same run, on the same machine, through the same relay, with the same
receiver; no figure of another day or machine is used.

    __main__      options, choice of rows, table on stdout, bench/results.json
    table         a row: what was measured, beside what, and the aim; pure
    data          the synthetic studies, made from a few lines and a pattern
    stage         everything a row needs: data, peers, proxies, routes
    subjects      the proxy and Orthanc as processes; CPU time and memory
    receiving, retrieving, querying, bounds      the rows themselves

Peers of the benchmark's own, each a process that is told what to do by lines of
JSON (``control``): ``workstation`` receives, retrieves and queries, ``archive``
holds generated studies and sends them, ``relay`` adds distance and caps the
rate, ``pynetdicom_peer`` is the usual Python application. Orthanc and DCMTK's
``storescu`` are the real ones.
"""
