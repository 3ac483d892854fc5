"""What users bring: records and their formats, the teacher's contexts, checks of answers, ready-made tasks."""
