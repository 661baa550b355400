package handoffhttp

import (
	"net/http/httptest"
	"strings"
	"testing"
)

// A name that could not travel is refused before anything happens to the connection.
func TestTakeoverNames(t *testing.T) {
	for _, name := range []string{"", strings.Repeat("n", 256)} {
		if err := Takeover(httptest.NewRecorder(), name); err == nil || !strings.Contains(err.Error(), "name") {
			t.Errorf("name of %d bytes: %v", len(name), err)
		}
	}
	n, app, ok := unwrapState(wrapState(strings.Repeat("n", 255), []byte("state")))
	if !ok || len(n) != 255 || string(app) != "state" {
		t.Errorf("a name of 255 bytes comes back with %d, state %q", len(n), app)
	}
}
