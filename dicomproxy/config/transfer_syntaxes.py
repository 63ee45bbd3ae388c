"""Transfer syntaxes that a source may be asked to send, by keyword (PS3.6 Table A-1).

Left out are those in which a stored instance cannot travel whole: referenced
pixel data (JPIP), whose link would not reach the workstation, and live video.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

PREFIX: Final = "1.2.840.10008.1.2"

BY_KEYWORD: Final = MappingProxyType(
    {
        "ImplicitVRLittleEndian": PREFIX,
        "ExplicitVRLittleEndian": f"{PREFIX}.1",
        "EncapsulatedUncompressedExplicitVRLittleEndian": f"{PREFIX}.1.98",
        "DeflatedExplicitVRLittleEndian": f"{PREFIX}.1.99",
        "ExplicitVRBigEndian": f"{PREFIX}.2",
        "JPEGBaseline8Bit": f"{PREFIX}.4.50",
        "JPEGExtended12Bit": f"{PREFIX}.4.51",
        "JPEGLossless": f"{PREFIX}.4.57",
        "JPEGLosslessSV1": f"{PREFIX}.4.70",
        "JPEGLSLossless": f"{PREFIX}.4.80",
        "JPEGLSNearLossless": f"{PREFIX}.4.81",
        "JPEG2000Lossless": f"{PREFIX}.4.90",
        "JPEG2000": f"{PREFIX}.4.91",
        "JPEG2000MCLossless": f"{PREFIX}.4.92",
        "JPEG2000MC": f"{PREFIX}.4.93",
        "MPEG2MPML": f"{PREFIX}.4.100",
        "MPEG2MPMLF": f"{PREFIX}.4.100.1",
        "MPEG2MPHL": f"{PREFIX}.4.101",
        "MPEG2MPHLF": f"{PREFIX}.4.101.1",
        "MPEG4HP41": f"{PREFIX}.4.102",
        "MPEG4HP41F": f"{PREFIX}.4.102.1",
        "MPEG4HP41BD": f"{PREFIX}.4.103",
        "MPEG4HP41BDF": f"{PREFIX}.4.103.1",
        "MPEG4HP422D": f"{PREFIX}.4.104",
        "MPEG4HP422DF": f"{PREFIX}.4.104.1",
        "MPEG4HP423D": f"{PREFIX}.4.105",
        "MPEG4HP423DF": f"{PREFIX}.4.105.1",
        "MPEG4HP42STEREO": f"{PREFIX}.4.106",
        "MPEG4HP42STEREOF": f"{PREFIX}.4.106.1",
        "HEVCMP51": f"{PREFIX}.4.107",
        "HEVCM10P51": f"{PREFIX}.4.108",
        "JPEGXLLossless": f"{PREFIX}.4.110",
        "JPEGXLJPEGRecompression": f"{PREFIX}.4.111",
        "JPEGXL": f"{PREFIX}.4.112",
        "HTJ2KLossless": f"{PREFIX}.4.201",
        "HTJ2KLosslessRPCL": f"{PREFIX}.4.202",
        "HTJ2K": f"{PREFIX}.4.203",
        "RLELossless": f"{PREFIX}.5",
        "DeflatedImageFrameCompression": f"{PREFIX}.8.1",
    }
)
