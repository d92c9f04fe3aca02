"""What models are worth: predictions beside measurements, contacts of structures and deep mutational scans."""
