"""What a page asks of this machine beside runs, in bounds: what a run would take, and what a
finished file answers.
"""
