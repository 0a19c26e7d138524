"""What training needs besides the model: which sentences come when, the loss, and the launcher. No fairseq in here."""
