"""An embedded region, to show the main job and to point a real workstation at.

Archives and workstation are pynetdicom application entities, so that what is
shown is also proof of interoperability; the proxy between them is the real
one, run as its own process from a configuration file like any other.
"""
