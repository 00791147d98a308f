"""What nodes draw: sheets of pictures, score cards and curves, with Pillow in a typeface that is
everywhere.
"""
