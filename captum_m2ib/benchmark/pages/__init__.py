"""Late interaction on drawn pages: do maps of a page fall on what the query names?"""
