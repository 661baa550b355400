package admin

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// MaxRekeySessions is how many sessions a RekeyRequest can name; more are meant by
// their pool.
const MaxRekeySessions = 500

// MaxRekeyListed is how many sessions each list of a RekeyReport names at most; the
// counts beside them are of all.
const MaxRekeyListed = 1000

// RekeyRequest asks for a KeyUpdate (RFC 8446 section 4.6.3) to be sent in the named
// sessions, in those of a pool, or in all when neither is given. Not both.
type RekeyRequest struct {
	Pool        string        `json:"pool,omitempty"`
	Sessions    []string      `json:"sessions,omitempty"`     // ids, as Sessions gives them
	RequestPeer bool          `json:"request_peer,omitempty"` // the peer is to change its key as well
	Wait        time.Duration `json:"wait,omitempty"`         // for all of it; 0: 30 s
}

func (r *RekeyRequest) check() error {
	switch {
	case r.Wait < 0:
		return fmt.Errorf("wait %s is negative: %w", r.Wait, ErrBadRequest)
	case r.Pool != "" && len(r.Sessions) > 0:
		return fmt.Errorf("either sessions or a pool, not both: %w", ErrBadRequest)
	case len(r.Sessions) > MaxRekeySessions:
		return fmt.Errorf("%d sessions named, the limit is %d; name their pool instead: %w", len(r.Sessions), MaxRekeySessions, ErrBadRequest)
	}
	for _, s := range r.Sessions {
		if _, err := ParseSessionID(s); err != nil {
			return err
		}
	}
	return nil
}

// ParseSessionID reads the id of a session, "s12", into its number. An error is an
// ErrBadRequest.
func ParseSessionID(s string) (uint64, error) {
	digits, ok := strings.CutPrefix(s, "s")
	n, err := strconv.ParseUint(digits, 10, 64)
	if !ok || err != nil || n == 0 || digits[0] < '1' || digits[0] > '9' {
		return 0, fmt.Errorf("%.40q is no session's id, such as s12: %w", s, ErrBadRequest)
	}
	return n, nil
}

// RekeyReport is what became of a RekeyRequest.
type RekeyReport struct {
	// Outcome is OutcomeStay when a session that can change its keys has not done so
	// now, else OutcomeMoved.
	Outcome          Outcome       `json:"exit_code"`
	Updated          int           `json:"updated"`           // the KeyUpdate is sent, and the next key in use
	Ended            int           `json:"ended"`             // the session came to its end meanwhile
	FailedCount      int           `json:"failed_count"`      // not now: ask again
	UnsupportedCount int           `json:"unsupported_count"` // not ever: version or kernel cannot
	Failed           []SessionNote `json:"failed"`            // the first MaxRekeyListed of them
	Unsupported      []SessionNote `json:"unsupported"`
	Error            string        `json:"error,omitempty"`
	DurationSecs     float64       `json:"duration_seconds"`
}

// SessionNote says something about one session.
type SessionNote struct {
	Session string `json:"session"`
	Why     string `json:"why"`
}

// MarshalJSON writes lists without an element as [], which scripts can count.
func (r RekeyReport) MarshalJSON() ([]byte, error) {
	type plain RekeyReport
	if r.Failed == nil {
		r.Failed = []SessionNote{}
	}
	if r.Unsupported == nil {
		r.Unsupported = []SessionNote{}
	}
	return json.Marshal(plain(r))
}
