"""A page to play with in a browser: a picture and captions in, maps and words with their bits out.

The page is made of Gradio (extra ``app``) and is served to this machine alone unless told otherwise. Neither the page
nor its server asks any other machine for anything.
"""
