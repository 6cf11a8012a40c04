"""Check a published folder or repository against its receipt, and measure it again
(docs/verify.md).

    places    the folder, or the repository at one commit
    findings  what was found, and the verdict
    sums      every file, against the bytes that the receipt says
    figures   receipt, report and card, against each other
    draw      which windows and items are measured again
    again     measures them, and compares; again_in_use: conversations and answers
    base      the full-precision file that KL is taken from
    verify    all of it

Everything that is read here is a stranger's: names lead nowhere else, sizes are bounded, GGUFs are
checked by our own reader and opened in the sandbox alone.
"""
