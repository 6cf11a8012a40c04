"""Work that a page asks of this machine in addition to runs, within limits: previews of a run, and
answers of a finished file.
"""
