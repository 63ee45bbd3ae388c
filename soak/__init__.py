"""A soak: the proxy as a process among peers that query, open, break, stall and come back.

``make soak`` runs it; ``python -m soak --help`` lists what may be chosen. Rooms:

* ``content`` - what the archives hold; every byte follows from a UID and a seed
* ``archive``, ``threaded`` - archives, each a process of its own
* ``region`` - starts peers and proxy, and knows how to hurt each
* ``workstation`` - queries, opens, and checks every byte that arrives
* ``reading`` - what people do at a workstation
* ``faults`` - sources die and stall, workstations leave, the disk fills
* ``watch`` - memory, descriptors, metrics and log of the proxy
* ``report`` - counts, violations and the table
* ``run`` - the order of it all

Rule kept: what counts as a violation is decided here and nowhere else, and
never by timing alone; a deadline that passes is a hang.
"""
