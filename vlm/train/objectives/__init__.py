"""What a stage trains for, one file each; the file name is the objective's kind. What a file defines:
`vlm/train/objectives/contract.py`."""
