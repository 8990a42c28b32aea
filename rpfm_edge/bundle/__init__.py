"""What a device needs: open a bundle and render."""
