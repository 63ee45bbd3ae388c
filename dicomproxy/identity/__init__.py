"""Who a patient is in each domain, and how foreign objects are made to look local.

Rules are pure; the table, PIX and PIXm are edges that answer
:class:`dicomproxy.ports.CrossReference`.
"""
