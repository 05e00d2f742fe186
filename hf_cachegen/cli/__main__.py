"""`python -m hf_cachegen.cli`: the same as `hf-cachegen`."""

from hf_cachegen.cli import main

if __name__ == "__main__":
    main()
