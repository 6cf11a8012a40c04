"""Start runs and report their progress: the web app, a Space and the API are built on this.

Every run is `python -m quantkit resume FOLDER` in a process of its own, with its config written
before; everything known about it is read back from its folder. Nothing here imports torch,
transformers or llama_cpp.
"""
