"""Model tensors to sections of a pack and back: planes, Huffman, differences. numpy and zstandard only.

Invariant: decoding allocates only what signed data says, writes only inside the files that it was given, and ends in
the exact bytes that were encoded or in an ArtifactError. The same input encodes to the same bytes on any machine.
"""
