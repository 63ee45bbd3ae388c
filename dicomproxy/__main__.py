"""``python -m dicomproxy``."""

from dicomproxy.cli.main import console

if __name__ == "__main__":
    console()
