package ktls

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// An owner that dies takes along how far it had used the keys. The next one finds out
// from the socket, not less and not much more.
func TestKeyUseSurvivesTheOwner(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, tc := range testSuites {
		t.Run(suiteTestName(tc.version, tc.suite), func(t *testing.T) {
			s := newScripted(t, LayerKernel, tc.version, tc.suite)
			sock, st, err := s.conn.Detach()
			if err != nil {
				t.Fatal(err)
			}
			facts, err1 := st.MarshalFacts()
			base, err2 := st.MarshalRecord()
			first := duplicate(t, sock)
			dead, err3 := Import(first, facts, base)
			if err1 != nil || err2 != nil || err3 != nil {
				t.Fatal(err1, err2, err3)
			}
			for range 50 {
				if _, err := dead.Write(pattern(100)); err != nil {
					t.Fatal(err)
				}
				s.want(typeData, string(pattern(100)))
				s.send(typeData, pattern(300))
				if _, err := dead.Read(make([]byte, 1000)); err != nil {
					t.Fatal(err)
				}
			}
			c, err := Import(duplicate(t, sock), facts, base)
			if err != nil {
				t.Fatal(err)
			}
			for name, v := range map[string][2]uint64{"sending": {c.txUsed, dead.txUsed}, "receiving": {c.rxUsed, dead.rxUsed}} {
				if got, was := v[0], v[1]; got < was || got > 2*was {
					t.Errorf("%s: the next owner counts %d blocks used, the dead one had used %d", name, got, was)
				}
			}
		})
	}
}
