package sys

import (
	"errors"
	"os"
	"testing"
	"time"
)

// Close is how a worker ends its Watch; whoever waits must be able to tell that from a
// failure.
func TestWatchClose(t *testing.T) {
	for _, name := range []string{"while it waits", "before it waits"} {
		t.Run(name, func(t *testing.T) {
			w, err := NewWatch()
			if err != nil {
				t.Fatal(err)
			}
			got := make(chan error, 1)
			wait := func() {
				_, err := w.Wait()
				got <- err
			}
			if name == "while it waits" {
				go wait()
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if name == "before it waits" {
				go wait()
			}
			select {
			case err = <-got:
			case <-time.After(10 * time.Second):
				t.Fatal("Close does not end Wait")
			}
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("Wait: %v, want os.ErrClosed", err)
			}
			if err := w.Add(0, 1); !errors.Is(err, os.ErrClosed) {
				t.Errorf("Add: %v, want os.ErrClosed", err)
			}
		})
	}
}
