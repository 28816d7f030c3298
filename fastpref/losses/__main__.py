"""``python -m fastpref.losses``: print or write the documentation of the losses."""

from fastpref.losses.docs import main

main()
