"""Programs to read and to run: `python -m fquant.examples.NAME`."""
