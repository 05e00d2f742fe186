"""What was learnt about models: files of profiles, where they are found and published, and how they are learnt."""
