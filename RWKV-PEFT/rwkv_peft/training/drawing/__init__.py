"""A step that learns from the model's own answers: it draws them, has them judged, and writes them down."""
