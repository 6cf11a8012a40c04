"""The web page: a form that starts runs, and views of them. Built on Gradio.

Nothing here imports torch, transformers or llama_cpp; the work is done by processes that
`quantkit.server.runs` starts.
"""
