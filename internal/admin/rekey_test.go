package admin

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestRekeyRoundTrip(t *testing.T) {
	want := &RekeyReport{Outcome: OutcomeStay, Updated: 7, Ended: 1, FailedCount: 1, UnsupportedCount: 2,
		Failed:       []SessionNote{{"s3", "on the move"}},
		Unsupported:  []SessionNote{{"s4", "TLS 1.2"}, {"s5", "TLS 1.2"}},
		DurationSecs: 0.5}
	var asked RekeyRequest
	path, _, _ := serve(t, &fakeBackend{rekey: func(_ context.Context, r RekeyRequest, p func(Progress)) (*RekeyReport, error) {
		asked = r
		p(Progress{Text: "changing", Done: 1, Total: 2})
		return want, nil
	}})
	req := RekeyRequest{Sessions: []string{"s1", "s20"}, RequestPeer: true, Wait: time.Minute}
	said := 0
	rep, err := Dial(path).Rekey(t.Context(), req, func(Progress) { said++ })
	if err != nil || said != 1 {
		t.Fatalf("%v; %d lines of progress", err, said)
	}
	if d := cmp.Diff(want, rep); d != "" {
		t.Errorf("report (-want +got):\n%s", d)
	}
	if d := cmp.Diff(req, asked); d != "" {
		t.Errorf("request as the backend saw it (-want +got):\n%s", d)
	}
}

// What is wrong with a request is found before anything is started, also when it comes
// from another client than ours.
func TestRekeyBadRequests(t *testing.T) {
	path, _, _ := serve(t, &fakeBackend{rekey: func(context.Context, RekeyRequest, func(Progress)) (*RekeyReport, error) {
		t.Error("started")
		return &RekeyReport{}, nil
	}})
	many := make([]string, MaxRekeySessions+1)
	for i := range many {
		many[i] = "s1"
	}
	for _, r := range []RekeyRequest{
		{Wait: -1}, {Pool: "p", Sessions: []string{"s1"}}, {Sessions: many},
		{Sessions: []string{"1"}}, {Sessions: []string{""}}, {Sessions: []string{"s"}}, {Sessions: []string{"s0"}},
		{Sessions: []string{"s+1"}}, {Sessions: []string{"s01"}}, {Sessions: []string{"s18446744073709551616"}},
	} {
		if _, err := Dial(path).Rekey(t.Context(), r, nil); !errors.Is(err, ErrBadRequest) {
			t.Errorf("%+.40v: %v", r, err)
		}
	}
	raw := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
	for _, body := range []string{`{"sessions":["x"]}`, `{"pool":"p","sessions":["s1"]}`, `{"everything":true}`, `[]`} {
		resp, err := raw.Post("http://x/v1/rekey", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", body, resp.Status)
		}
	}
}

func TestParseSessionID(t *testing.T) {
	if n, err := ParseSessionID("s18446744073709551615"); n != 1<<64-1 || err != nil {
		t.Error(n, err)
	}
}
