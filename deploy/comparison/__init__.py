"""``mara eval CONFIG``: systems, data sets and judges compared, in stages that can be resumed."""
