"""`python -m hf_datavec` is the same as `hf-datavec`."""

from hf_datavec.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
