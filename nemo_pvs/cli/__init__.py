"""The command ``pvs``: each verb parses its options, calls the API and prints."""
