"""Configuration: one YAML file becomes one frozen model, or a list of faults.

Text becomes values here and nowhere else. A fault is found before the first
association is accepted, and names the file, the line, the YAML path, what was
found and what was expected.
"""

from __future__ import annotations

from dicomproxy.config.faults import ConfigError, Fault
from dicomproxy.config.loader import load_config
from dicomproxy.config.model import Config

__all__ = ["Config", "ConfigError", "Fault", "load_config"]
