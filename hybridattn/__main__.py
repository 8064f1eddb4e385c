"""``python -m hybridattn``: the ``hybridattn`` command."""

from hybridattn.cli import main

if __name__ == "__main__":
    main()
