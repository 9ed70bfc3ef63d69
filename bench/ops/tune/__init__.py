"""A better row for a table of tiles, searched on the GPU that is here: `python -m bench.ops --tune attention`, or `--tune mlp`.

Per size and kernel every tile of a grid is tried in place of the table's, those nearest to it first: it must fit the GPU's shared
memory, compile, spill no more than a few bytes and compute what the table's tile computes. The fastest is then timed against the
table's in turns, and kept if it is still ahead. What is printed is to be pasted into the table by whoever believes it, with a line
for the machine-code gate where the tile spills; nothing here runs when a model does.

`tables` says what the search must know of each op, `search` finds, `report` prints and writes JSON as tiles are done.
"""
