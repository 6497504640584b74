"""Reading adapter folders: from files to an `Adapter`, checked and in the stored dtypes."""
