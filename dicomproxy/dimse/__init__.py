"""The DICOM upper layer and DIMSE on asyncio (PS3.8, PS3.7).

A core without I/O (:mod:`pdu`, :mod:`framing`, :mod:`command`, :mod:`machine`,
:mod:`negotiation`) and a thin asyncio edge (:mod:`transport`,
:mod:`association`, :mod:`layer`, :mod:`listener`, :mod:`pool`, :mod:`breaker`,
:mod:`operations`). Knows nothing of priors, patients or studies.
"""
