"""What a step learns from if the model answers itself: drawing answers, having them judged, and writing them down."""
