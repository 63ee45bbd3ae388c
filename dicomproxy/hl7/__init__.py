"""HL7 v2: messages, and their transport over MLLP; shared by whoever talks to a RIS or HIS.

A message that was acknowledged is on disk, and is handled even if the process
ends in between. Nothing here knows what a patient is: fields go in and out.

Messages are parsed by hl7kit: it takes what is really sent (line feeds, unknown
segments, short headers), undoes every escape sequence of a separator, raises one
exception, needs nothing else and is fast enough for the event loop. Of the others
hl7types refuses or drops what does not fit its models, and hl7 and hl7apy have seen
no release for years (hl7 loses the end of a value after an unfinished escape).
Only ``message`` knows it.
"""
